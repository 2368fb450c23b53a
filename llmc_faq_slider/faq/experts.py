"""Who scores the candidates: a model in this process, or one behind a server."""

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmc_faq_slider.faq.endpoint import (
    Address,
    Endpoint,
    EndpointError,
    InvalidReply,
    RequestRefused,
)
from llmc_faq_slider.faq.generators import end_ids
from llmc_faq_slider.faq.identity import check_tokenizers, model_fingerprint
from llmc_faq_slider.faq.loading import open_model
from llmc_faq_slider.faq.prompts import Message
from llmc_faq_slider.faq.rendering import encode, prompt_text, template_text
from llmc_faq_slider.faq.replies import ChatReply, parse
from llmc_faq_slider.faq.sampling import left_pad, sample_batch
from llmc_faq_slider.faq.serving import contact, recall, remember, score_ids
from llmc_faq_slider.faq.settings import Sampling
from llmc_faq_slider.products import multiplied_in, product_dtype

#: prompts scored by a server at once: it keeps their whole logits in memory
_SCORING_CONCURRENCY = 4
_BATCH = 8


class Expert(Protocol):
    """Scores answers and grades them in words."""

    def mean_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[float]:
        """Mean log-probability per answer token given its prompt, in nats."""
        ...

    def replies(
        self,
        chats: Sequence[Sequence[Message]],
        schema: dict[str, Any],
        max_new_tokens: int,
        pattern: str | None = None,
    ) -> list[str]:
        """The likeliest reply to each chat, held to a JSON schema where possible.

        A reply that cannot be had is empty.

        :param pattern: regular expression to hold it to instead
        """
        ...


@dataclass(frozen=True)
class ExpertSource:
    """An expert that is only loaded when something has to be scored.

    :param identity: JSON-like facts that change when its scores would
    :param open: context in which it is loaded
    """

    identity: dict[str, str]
    open: Callable[[], AbstractContextManager[Expert]]

    @property
    def facts(self) -> dict[str, str]:
        """The identity without where it was found."""
        return {k: v for k, v in self.identity.items() if k != "name"}


class TransformersExpert:
    """A causal language model in this process."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self._tokenizer = tokenizer

    def mean_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(prompts), _BATCH):
            part = slice(start, start + _BATCH)
            scores += mean_logprobs(self.model, prompts[part], answers[part])
        return scores

    def replies(
        self,
        chats: Sequence[Sequence[Message]],
        schema: dict[str, Any],
        max_new_tokens: int,
        pattern: str | None = None,
    ) -> list[str]:
        tokenizer = self._tokenizer
        texts = [prompt_text(tokenizer, chat, False) for chat in chats]
        greedy = Sampling(1.0, 1.0, 1, max_new_tokens)
        ends = end_ids(tokenizer, self.model.generation_config)
        found: list[str] = []
        for start in range(0, len(texts), _BATCH):
            prompts = [encode(tokenizer, text) for text in texts[start:][:_BATCH]]
            zeros = [0] * len(prompts)
            draws = sample_batch(self.model, prompts, zeros, greedy, ends)
            found += [
                str(tokenizer.decode(draw.ids, skip_special_tokens=True))
                for draw in draws
            ]
        return found


class EndpointExpert:
    """A model behind an OpenAI-compatible server; scores need ``prompt_logprobs``.

    :param same_tokens: its token ids are the target's
    """

    def __init__(
        self, endpoint: Endpoint, model: str, same_tokens: bool, concurrency: int
    ):
        self._endpoint = endpoint
        self._model = model
        self._same_tokens = same_tokens
        self._concurrency = concurrency

    def mean_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[float]:
        """See :class:`Expert`.

        :raises EndpointError: when the server does not score prompts, or not such ids
        """
        if not self._same_tokens:
            raise EndpointError(
                f"the expert {self._model!r} is not known to have the target's "
                "tokenizer, so it cannot score its ids. Name another `expert`, or "
                "choose the selector expert_judge or random."
            )

        def score(prompt: Sequence[int], answer: Sequence[int]) -> float:
            ids = [*prompt, *answer]
            logprobs = score_ids(self._endpoint, self._model, ids)[-len(answer) :]
            return sum(logprobs) / len(logprobs)

        try:
            with ThreadPoolExecutor(_SCORING_CONCURRENCY) as pool:
                return list(pool.map(score, prompts, answers))
        except (RequestRefused, InvalidReply) as error:
            raise EndpointError(
                f"{self._endpoint.address.url} does not tell log-probabilities of "
                f"prompts ({error}). Name another `expert`, or choose the selector "
                "expert_judge or random."
            ) from error

    def replies(
        self,
        chats: Sequence[Sequence[Message]],
        schema: dict[str, Any],
        max_new_tokens: int,
        pattern: str | None = None,
    ) -> list[str]:
        held: dict[str, Any] = {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "grades", "strict": True, "schema": schema},
            }
        }
        if pattern is not None:
            held = {"structured_outputs": {"regex": pattern}}

        def reply(chat: Sequence[Message]) -> str:
            return self._reply(chat, held, max_new_tokens)

        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(reply, chats))

    def _reply(
        self, chat: Sequence[Message], held: dict[str, Any], max_new_tokens: int
    ) -> str:
        """A reply held to a form or, where the server refuses that, any reply."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": list(chat),
            "temperature": 0,
            "max_tokens": max_new_tokens,
        }
        for more in (held, {}):
            try:
                reply = self._endpoint.post("/chat/completions", body | more)
                return parse(ChatReply, reply).choices[0].message.content or ""
            except RequestRefused:
                continue
            except InvalidReply:
                break
        return ""


@torch.inference_mode()
def mean_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    chunk: int = 256,
) -> list[float]:
    """Mean natural log-probability per answer token given its prompt.

    The same quantity that sampling yields where the expert is the generator itself. The
    forward runs in the model's own dtype, but for products that are faster in a wider
    one; log-softmax in fp32, ``chunk`` positions at a time.

    :param prompts: prompt ids per row, not empty
    :param answers: answer ids per row, not empty
    """
    device = model.device
    rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    ids, mask = left_pad(rows, device)
    longest = max(len(answer) for answer in answers)
    with multiplied_in(product_dtype("auto", device), device):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=longest + 1,
        ).logits[:, :-1]
    labels = ids[:, -longest:]
    token_logprobs = torch.cat(
        [
            _gather(logits[:, i : i + chunk], labels[:, i : i + chunk])
            for i in range(0, longest, chunk)
        ],
        dim=-1,
    )
    return [
        float(token_logprobs[i, longest - len(answer) :].mean())
        for i, answer in enumerate(answers)
    ]


def local_expert(
    name: str, target: PreTrainedTokenizerBase, only_judges: bool = False
) -> ExpertSource:
    """A model from a folder or a hub, on the accelerator if any.

    :param only_judges: it reads and writes text, so its tokenizer may be any
    :raises ValueError: when it cannot be read
    :raises FamilyError: when its tokenizer is not the target's
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expert {name!r} cannot be read: {error}. Give `generator`, `target`, a "
            "folder, a hub id or the URL of a server."
        ) from error
    if not only_judges:
        check_tokenizers(target, tokenizer, name)
    speaker = tokenizer if template_text(tokenizer) is not None else target

    @contextmanager
    def opened() -> Iterator[Expert]:
        model = open_model(name)
        accelerated = torch.accelerator.is_available()
        if accelerated:
            model.to(torch.accelerator.current_accelerator())
        yield TransformersExpert(model, speaker)
        del model
        gc.collect()
        if accelerated:
            torch.accelerator.empty_cache()

    identity = {"kind": "local", "name": name, "weights": model_fingerprint(name)}
    return ExpertSource(identity, opened)


def loaded_expert(
    opened_model: Callable[[], AbstractContextManager[PreTrainedModel]],
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str,
) -> ExpertSource:
    """The target.

    :param opened_model: context with the model in eval mode and in full precision
    :param fingerprint: hash of its weights
    """

    @contextmanager
    def opened() -> Iterator[Expert]:
        with opened_model() as model:
            yield TransformersExpert(model, tokenizer)

    return ExpertSource({"kind": "target", "weights": fingerprint}, opened)


def endpoint_expert(
    address: Address,
    target: PreTrainedTokenizerBase,
    folder: Path,
    model: str | None = None,
    same_tokens: bool = False,
    concurrency: int = 8,
) -> ExpertSource:
    """A model behind a server.

    :param folder: where to remember what the server is
    :param model: name the server knows it by; None for the only one it has
    :param same_tokens: it has the target's tokenizer, though it may not show that
    :raises EndpointError: when the server cannot be reached or its model not told
    """
    served = recall(folder, address, model, target) or contact(address, model, target)
    remember(folder, address, served, target)
    same = same_tokens or served.same_tokenizer is True

    @contextmanager
    def opened() -> Iterator[Expert]:
        endpoint = Endpoint(address, concurrency)
        try:
            yield EndpointExpert(endpoint, served.model, same, concurrency)
        finally:
            endpoint.close()

    identity = {"kind": "endpoint", "model": served.model, "name": address.url}
    return ExpertSource(identity, opened)


def _gather(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    chosen = logits.gather(-1, labels[..., None])[..., 0]
    return chosen - logits.logsumexp(-1)
