"""What a server is and can do: found out once, remembered in a file."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from loguru import logger
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.endpoint import (
    Address,
    Endpoint,
    EndpointError,
    InvalidReply,
    RequestRefused,
)
from llmc_faq_slider.faq.identity import encoding_probe, tokenizer_hash
from llmc_faq_slider.faq.records import REMEDY, seal, unseal
from llmc_faq_slider.faq.rendering import encode, prompt_text, template_text
from llmc_faq_slider.faq.replies import (
    ChatReply,
    Models,
    ServedModel,
    TextReply,
    Tokens,
    parse,
    prompt_logprobs,
)
from llmc_faq_slider.files import writing

Api = Literal["auto", "completions", "chat"]

_PROBE = [{"role": "user", "content": "Name a colour and say why you like it."}]
#: nats per token by which the same log-probabilities told in two ways may differ
_SAME_LOGPROB = 0.05


class Served(BaseModel):
    """A model behind a server.

    :param model: name the server knows it by
    :param context: positions it can attend to, None if not told
    :param same_tokenizer: its tokenizer encodes the probe texts like the target's;
        None if the server does not tokenise for others
    :param probed: the ``api`` asked for when the rest was found out, None if it
        was not yet
    :param api: ``completions`` takes token ids, ``chat`` takes messages
    :param extras: it takes vLLM's extra parameters and returns token ids
    :param logprobs: it tells log-probabilities of the model itself, before
        temperature and cuts
    """

    model_config = ConfigDict(frozen=True)

    model: str
    context: int | None = None
    same_tokenizer: bool | None = None
    probed: Api | None = None
    api: Literal["completions", "chat"] = "completions"
    extras: bool = False
    logprobs: bool = False


def contact(
    address: Address, model: str | None, target: PreTrainedTokenizerBase
) -> Served:
    """Ask a server which model it has and how that tokenises.

    :raises EndpointError: when it cannot be reached, or has no or several models and
        none was named
    """
    endpoint = Endpoint(address)
    try:
        entry = _choose(_models(endpoint, model), model, address)
        same = _same_encoding(address, entry.id, target)
        return Served(model=entry.id, context=entry.max_model_len, same_tokenizer=same)
    finally:
        endpoint.close()


def probe(
    endpoint: Endpoint,
    served: Served,
    speaker: PreTrainedTokenizerBase,
    api: Api,
    ids_known: bool,
) -> Served:
    """Find the best way to ask this server, by one short request per way.

    :param speaker: tokenizer and template the prompts are made with
    :param api: way to use, ``auto`` for token ids where possible
    :param ids_known: the speaker's ids are the server's
    :raises EndpointError: when no way works
    """
    ways = [("completions", True), ("chat", True), ("chat", False)]
    ways.append(("completions", False))
    problems = []
    for kind, extras in ways:
        if api not in ("auto", kind) or (kind == "completions" and not ids_known):
            continue
        if kind == "chat" and template_text(speaker) is None:
            continue
        for logprobs in (True, False):
            found = served.model_copy(
                update={
                    "probed": api,
                    "api": kind,
                    "extras": extras,
                    "logprobs": logprobs,
                }
            )
            try:
                raw = _try(endpoint, found, speaker)
            except (RequestRefused, InvalidReply) as error:
                problems.append(f"{kind}: {error}")
                continue
            logger.info(
                f"FAQ: {endpoint.address.url} is asked through {kind}"
                f"{' with token ids' if extras else ''}, log-probabilities: "
                f"{'its own' if logprobs and raw else 'none or changed by sampling'}"
            )
            return found.model_copy(update={"logprobs": logprobs and raw})
    tried = "; ".join(problems) or f"api {api} needs the generator's tokenizer"
    raise EndpointError(f"{endpoint.address.url} cannot be asked: {tried}")


def score_ids(endpoint: Endpoint, model: str, ids: list[int]) -> list[float]:
    """Log-probability of every id but the first under the served model.

    :raises RequestRefused: when the server does not score prompts
    :raises InvalidReply: when it leaves positions out
    """
    body = {
        "model": model,
        "prompt": ids,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    reply = parse(TextReply, endpoint.post("/completions", body))
    return prompt_logprobs(reply.choices[0], ids)


def recall(
    folder: Path,
    address: Address,
    model: str | None,
    target: PreTrainedTokenizerBase,
) -> Served | None:
    """What is remembered of a named model, None for an unnamed or unknown one."""
    if model is None:
        return None
    path = _path(folder, address, model, target)
    try:
        return Served.model_validate(unseal(json.loads(path.read_bytes())))
    except (OSError, ValueError):
        return None


def remember(
    folder: Path, address: Address, served: Served, target: PreTrainedTokenizerBase
) -> None:
    path = _path(folder, address, served.model, target)
    text = json.dumps(seal(served.model_dump()), indent=2) + "\n"
    with writing(path.parent, REMEDY):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def _path(
    folder: Path, address: Address, model: str, target: PreTrainedTokenizerBase
) -> Path:
    name = json.dumps([address.url, model, tokenizer_hash(target)])
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def _models(endpoint: Endpoint, model: str | None) -> list[ServedModel]:
    try:
        return parse(Models, endpoint.get("/models")).data
    except (RequestRefused, InvalidReply) as error:
        if model is None:
            raise EndpointError(
                f"{endpoint.address.url} does not tell its models ({error}); name one "
                "in `generator_model`"
            ) from error
        return [ServedModel(id=model)]


def _choose(
    entries: list[ServedModel], model: str | None, address: Address
) -> ServedModel:
    named = [entry for entry in entries if model in (None, entry.id)]
    if len(named) == 1:
        return named[0]
    names = ", ".join(repr(entry.id) for entry in entries[:10]) or "none"
    wanted = "`generator_model` is not set" if model is None else f"not {model!r}"
    raise EndpointError(
        f"{address.url} serves {names}, {wanted}. Name one of them in "
        "`generator_model`."
    )


def _same_encoding(
    address: Address, model: str, target: PreTrainedTokenizerBase
) -> bool | None:
    """Compare encodings with vLLM's ``/tokenize``, which lies beside ``/v1``."""
    parts = urlsplit(address.url)
    root = parts.path.removesuffix("/v1")
    base = urlunsplit((parts.scheme, parts.netloc, root, "", ""))
    endpoint = Endpoint(Address(base, address.key_variable, address.timeout, 2))
    text = encoding_probe(target)
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        return parse(Tokens, endpoint.post("/tokenize", body)).tokens == encode(
            target, text
        )
    except EndpointError:
        return None
    finally:
        endpoint.close()


def _try(endpoint: Endpoint, way: Served, speaker: PreTrainedTokenizerBase) -> bool:
    """Ask once; whether the log-probabilities told are the model's own.

    Without a second way to get them they are trusted to be.
    """
    body: dict[str, Any] = {"model": way.model, "max_tokens": 8, "temperature": 0.5}
    if way.extras:
        body |= {"return_token_ids": True, "top_k": 5, "stop_token_ids": []}
    if way.api == "chat":
        body |= {"messages": _PROBE} | ({"logprobs": True} if way.logprobs else {})
        chat = parse(ChatReply, endpoint.post("/chat/completions", body)).choices[0]
        return bool(chat.answer_logprobs)
    has_template = template_text(speaker) is not None
    text = prompt_text(speaker, _PROBE, None) if has_template else _PROBE[0]["content"]
    ids = encode(speaker, text)
    body |= {"prompt": ids} | ({"logprobs": 0} if way.logprobs else {})
    choice = parse(TextReply, endpoint.post("/completions", body)).choices[0]
    told, answer = choice.answer_logprobs, choice.token_ids
    if not way.logprobs or not told or answer is None or len(told) != len(answer):
        return bool(told)
    try:
        scored = score_ids(endpoint, way.model, [*ids, *answer])[-len(answer) :]
    except (RequestRefused, InvalidReply):
        return True
    gap = sum(abs(a - b) for a, b in zip(told, scored, strict=True)) / len(told)
    return gap <= _SAME_LOGPROB
