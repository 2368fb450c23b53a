"""Who writes the candidates. In-process ``transformers`` models live here.

A generator of another kind (one behind an endpoint, say) is one more class with the
methods of :class:`Generator` and one more function that returns a
:class:`GeneratorSource`; nothing else has to know of it.
"""

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from llmc_faq_slider.faq.identity import (
    FamilyError,
    check_larger,
    check_lineage,
    check_tokenizers,
    folder_fingerprint,
)
from llmc_faq_slider.faq.rendering import end_of_turn_id, has_thinking_switch
from llmc_faq_slider.faq.sampling import Draw, context_length, sample_batch
from llmc_faq_slider.faq.settings import Sampling


class Generator(Protocol):
    """Writes answers."""

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        on_step: Callable[[int], None],
    ) -> list[Draw]:
        """One answer per prompt, with log-probabilities under the generator.

        :param prompts: prompt ids per row
        :param seeds: one 32-bit seed per row
        :param on_step: told the number of unfinished rows now and then
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
    """

    identity: dict[str, str]
    tokenizer: PreTrainedTokenizerBase
    end_ids: frozenset[int]
    context_length: int | None
    defaults: GenerationConfig
    open: Callable[[], AbstractContextManager[Generator]]


class TransformersGenerator:
    """A causal language model in this process."""

    def __init__(self, model: PreTrainedModel, end_ids: Collection[int]):
        self._model = model
        self._end_ids = frozenset(end_ids)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        on_step: Callable[[int], None],
    ) -> list[Draw]:
        return sample_batch(
            self._model, prompts, seeds, sampling, self._end_ids, on_step
        )


def self_source(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str,
    full_precision: Callable[[], AbstractContextManager[None]],
) -> GeneratorSource:
    """The target as its own generator.

    :param fingerprint: hash of its current weights
    :param full_precision: context in which its forward is that of the plain weights
    """
    defaults = model.generation_config or GenerationConfig()
    ends = end_ids(tokenizer, defaults)

    @contextmanager
    def opened() -> Iterator[Generator]:
        was_training = model.training
        with full_precision():
            model.eval()
            yield TransformersGenerator(model, ends)
            model.train(was_training)

    return GeneratorSource(
        identity={"kind": "self", "weights": fingerprint},
        tokenizer=tokenizer,
        end_ids=ends,
        context_length=context_length(model.config),
        defaults=defaults,
        open=opened,
    )


def sibling_source(
    name: str,
    target_config: PretrainedConfig,
    target_tokenizer: PreTrainedTokenizerBase,
    target_size: int,
) -> GeneratorSource:
    """A larger sibling from a folder or a hub, loaded to the accelerator if any.

    :param name: folder or hub id
    :param target_size: parameters of the target
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
    check_lineage(target_config, config, name)
    check_tokenizers(target_tokenizer, tokenizer, name)
    defaults = _generation_config(name)
    ends = end_ids(tokenizer, defaults)

    @contextmanager
    def opened() -> Iterator[Generator]:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        check_larger(target_size, model.num_parameters(), name)
        accelerated = torch.accelerator.is_available()
        if accelerated:
            model.to(torch.accelerator.current_accelerator())
        yield TransformersGenerator(model, ends)
        del model
        gc.collect()
        if accelerated:
            torch.accelerator.empty_cache()

    return GeneratorSource(
        identity={"kind": "sibling", "name": name, "weights": _fingerprint(name)},
        tokenizer=tokenizer,
        end_ids=ends,
        context_length=context_length(config),
        defaults=defaults,
        open=opened,
    )


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
    """Given values first, then the generator's own, then ours by kind of template."""
    thinking = has_thinking_switch(source.tokenizer)
    ours = (0.6, 0.95, 20) if thinking else (0.7, 0.8, 20)
    own = source.defaults
    return Sampling(
        temperature=float(_first(temperature, own.temperature, ours[0])),
        top_p=float(_first(top_p, own.top_p, ours[1])),
        top_k=int(_first(top_k, own.top_k, ours[2])),
        max_new_tokens=max_new_tokens,
    )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _generation_config(name: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig()


def _fingerprint(name: str) -> str:
    if Path(name).is_dir():
        return folder_fingerprint(Path(name))
    # a hub snapshot lives in a folder named by its commit
    return Path(str(cached_file(name, "config.json"))).parent.name
