"""Who writes the candidates. In-process ``transformers`` models live here.

A generator of another kind is one more class with the methods of :class:`Generator`
and one more function that returns a :class:`GeneratorSource`, as in
``faq/endpoint_generator.py``; nothing else has to know of it.
"""

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

import torch
from loguru import logger
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmc_faq_slider.context import context_length
from llmc_faq_slider.faq.identity import (
    FamilyError,
    check_larger,
    check_lineage,
    check_tokenizers,
    model_fingerprint,
)
from llmc_faq_slider.faq.loading import open_model
from llmc_faq_slider.faq.prompts import Message
from llmc_faq_slider.faq.rendering import (
    encode,
    end_of_turn_id,
    has_thinking_switch,
)
from llmc_faq_slider.faq.sampling import Draw, sample_batch
from llmc_faq_slider.faq.settings import Sampling


@dataclass(frozen=True)
class Request:
    """One question to a generator.

    :param ids: the prompt, rendered and tokenised as the generator reads it
    :param seed: 32-bit seed of the answer
    :param messages: what ``ids`` render, None where a text is continued
    :param enable_thinking: value of the template's switch, None if it has none
    :param inside_thinking: the rendered prompt ends inside a think block
    """

    ids: Sequence[int]
    seed: int
    messages: Sequence[Message] | None = None
    enable_thinking: bool | None = None
    inside_thinking: bool = False


class Generator(Protocol):
    """Writes answers."""

    def answer(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_step: Callable[[float], None],
        on_draw: Callable[[int, Draw], None],
    ) -> None:
        """Answer each request once, with log-probabilities under the generator.

        :param on_step: told the share that is done, 0 to 1, now and then
        :param on_draw: given the position of a request and its answer, in any order,
            from the calling thread
        """
        ...


@dataclass(frozen=True)
class GeneratorSource:
    """A generator that is only loaded when something has to be generated.

    :param identity: JSON-like facts that change when its answers would
    :param tokenizer: its tokenizer, with its own chat template
    :param end_ids: ids that end an answer
    :param context_length: positions it can attend to, None for unknown
    :param defaults: its own sampling settings
    :param open: context in which the generator is loaded
    :param independent: an answer does not hang, not even in its rounding, on which
        others are asked for at the same time
    :param shares_tokens: its ids mean the same to the target, whose ids the answers
        have to be made of otherwise
    """

    identity: dict[str, str]
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    context_length: int | None
    defaults: GenerationConfig
    open: Callable[[], AbstractContextManager[Generator]]
    independent: bool = False
    shares_tokens: bool = True


class TransformersGenerator:
    """A causal language model in this process.

    :param translate: makes target ids of the drawn ones, None where they are the same
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_ids: Collection[int],
        translate: Callable[[Draw], Draw] | None = None,
    ):
        self._model = model
        self._end_ids = frozenset(end_ids)
        self._translate = translate

    def answer(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_step: Callable[[float], None],
        on_draw: Callable[[int, Draw], None],
    ) -> None:
        steps = count(1)
        draws = sample_batch(
            self._model,
            [request.ids for request in requests],
            [request.seed for request in requests],
            sampling,
            self._end_ids,
            lambda rows: on_step(next(steps) / sampling.max_new_tokens),
        )
        for position, draw in enumerate(draws):
            on_draw(position, self._translate(draw) if self._translate else draw)


def self_source(
    opened_model: Callable[[], AbstractContextManager[PreTrainedModel]],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    defaults: GenerationConfig,
    fingerprint: str,
) -> GeneratorSource:
    """The target as its own generator.

    :param opened_model: context with the model in eval mode and in full precision
    :param defaults: its own sampling settings
    :param fingerprint: hash of its current weights
    """
    ends = end_ids(tokenizer, defaults)

    @contextmanager
    def opened() -> Iterator[Generator]:
        with opened_model() as model:
            yield TransformersGenerator(model, ends)

    return GeneratorSource(
        identity={"kind": "self", "weights": fingerprint},
        tokenizer=tokenizer,
        end_ids=ends,
        context_length=context_length(config),
        defaults=defaults,
        open=opened,
    )


def sibling_source(
    name: str,
    target_config: PretrainedConfig,
    target_tokenizer: PreTrainedTokenizerBase,
    target_size: int,
    allow_retokenize: bool = False,
) -> GeneratorSource:
    """A larger sibling from a folder or a hub, loaded to the accelerator if any.

    :param name: folder or hub id
    :param target_size: parameters of the target
    :param allow_retokenize: take a model of another line or with another tokenizer,
        whose answers are tokenised again for the target
    :raises FamilyError: when it is of another family or not larger
    """
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FamilyError(
            f"generator {name!r} cannot be read: {error}. Give `self`, a folder or a "
            "hub id of a larger sibling."
        ) from error
    shares = share_tokens(target_tokenizer, tokenizer, name, allow_retokenize)
    if not allow_retokenize:
        check_lineage(target_config, config, name)
    defaults = generation_config(name)
    ends = end_ids(tokenizer, defaults)
    translate = None if shares else translator(tokenizer, target_tokenizer, ends)

    @contextmanager
    def opened() -> Iterator[Generator]:
        model = open_model(name)
        check_larger(target_size, model.num_parameters(), name)
        accelerated = torch.accelerator.is_available()
        if accelerated:
            model.to(torch.accelerator.current_accelerator())
        yield TransformersGenerator(model, ends, translate)
        del model
        gc.collect()
        if accelerated:
            torch.accelerator.empty_cache()

    return GeneratorSource(
        identity={"kind": "sibling", "name": name, "weights": model_fingerprint(name)},
        tokenizer=tokenizer,
        end_ids=ends,
        context_length=context_length(config),
        defaults=defaults,
        open=opened,
        shares_tokens=shares,
    )


def share_tokens(
    target: PreTrainedTokenizerBase,
    generator: PreTrainedTokenizerBase,
    name: str,
    allow_retokenize: bool,
) -> bool:
    """Whether two models share their token ids.

    :raises FamilyError: when they do not and ``allow_retokenize`` is off
    """
    try:
        check_tokenizers(target, generator, name)
    except FamilyError as error:
        if not allow_retokenize:
            raise
        logger.warning(f"FAQ: answers are tokenised again: {error}")
        return False
    return True


def translator(
    speaker: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    ends: Collection[int],
) -> Callable[[Draw], Draw]:
    """Makes target ids of a draw of the speaker's ids, by way of the text."""
    ending = end_of_turn_id(target)

    def translate(draw: Draw) -> Draw:
        body = draw.ids[:-1] if draw.finished and draw.ids[-1] in ends else draw.ids
        text = str(speaker.decode(body, skip_special_tokens=True))
        ids = encode(target, text)
        if draw.finished and ending is not None:
            ids.append(ending)
        return replace(draw, ids=ids, exact=False)

    return translate


def end_ids(
    tokenizer: PreTrainedTokenizerBase, defaults: GenerationConfig
) -> frozenset[int]:
    """Every id that ends an answer: the model's, the tokenizer's, the template's."""
    own = defaults.eos_token_id
    listed = own if isinstance(own, list) else [own]
    found = {*listed, tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    return frozenset(index for index in found if index is not None)


def resolve_sampling(
    source: GeneratorSource,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Sampling:
    """Given values first, then the generator's own, then ours by kind of template.

    A server that has not told its own applies them by itself, so ours stay out of it.
    """
    thinking = has_thinking_switch(source.tokenizer)
    ours: tuple[float | None, ...] = (0.6, 0.95, 20) if thinking else (0.7, 0.8, 20)
    if source.identity["kind"] == "endpoint":
        ours = (None, None, None)
    own = source.defaults
    k = _first(top_k, own.top_k, ours[2])
    return Sampling(
        temperature=_first(temperature, own.temperature, ours[0]),
        top_p=_first(top_p, own.top_p, ours[1]),
        top_k=None if k is None else int(k),
        max_new_tokens=max_new_tokens,
    )


def _first(*values: float | None) -> float | None:
    return next((float(value) for value in values if value is not None), None)


def generation_config(name: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig()
