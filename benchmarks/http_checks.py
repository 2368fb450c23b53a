"""What clients of a server get, against the model in memory: one, streamed, sixteen."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from benchmarks.served import Tolerance
from llmc_faq_slider.report.server import Server

__all__ = ["CLIENTS", "check_http"]

CLIENTS = 16
QUESTION = "Tell me about the weather."


def check_http(
    server: Server,
    rows: Tensor,
    expected: Tensor,
    bound: Tolerance,
    chats: bool = True,
) -> tuple[dict[str, float], list[str]]:
    """
    Log-probabilities asked for by one client and by sixteen at once, text streamed and
    whole, by completion and by chat.

    :param rows: token ids ``[rows, length]``
    :param expected: log-probabilities ``[rows, length - 1]`` of the model in memory
    :param chats: the model has a chat template
    :return: figures, and what is wrong as sentences
    """
    failures = []
    alone = torch.tensor(server.prompt_logprobs(rows[0].tolist()))
    order = [index % len(rows) for index in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = pool.map(server.prompt_logprobs, (rows[i].tolist() for i in order))
        together = torch.tensor(list(asked))
    figures = {}
    for name, told, wanted in (
        ("one client", alone[None], expected[:1]),
        (f"{CLIENTS} clients", together, expected[order]),
    ):
        difference = (told - wanted).abs()
        figures[f"mean difference, {name}"] = difference.mean().item()
        figures[f"largest difference, {name}"] = difference.max().item()
        if difference.mean() > bound.mean or difference.max() > bound.largest:
            failures.append(
                f"over HTTP, {name}: log-probabilities differ by "
                f"{difference.mean():.4f} on average and {difference.max():.3f} at most"
            )
    prompt = rows[0, :32].tolist()
    whole = server.complete(prompt, max_tokens=24)
    pieces = list(server.stream(prompt, max_tokens=24))
    if "".join(pieces) != whole or len(pieces) < 2:
        failures.append(f"streamed text is {''.join(pieces)!r}, asked whole {whole!r}")
    if not chats:
        return figures, failures
    spoken = server.chat(QUESTION, max_tokens=24)
    heard = list(server.stream_chat(QUESTION, max_tokens=24))
    if "".join(heard) != spoken or len(heard) < 2 or not spoken.strip():
        failures.append(f"streamed chat is {''.join(heard)!r}, asked whole {spoken!r}")
    return figures, failures
