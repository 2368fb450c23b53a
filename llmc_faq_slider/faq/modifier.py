"""FAQ as a recipe stage: fields, lifecycle and calls."""

import os
from functools import partial
from typing import Any

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmc_faq_slider.faq.generators import (
    GeneratorSource,
    resolve_sampling,
    self_source,
    sibling_source,
)
from llmc_faq_slider.faq.identity import weights_fingerprint
from llmc_faq_slider.faq.regenerate import regenerate
from llmc_faq_slider.faq.rendering import template_text
from llmc_faq_slider.faq.sampling import context_length
from llmc_faq_slider.faq.seeds import Seed, load_seeds, seeds_from_rows, shipped_seeds
from llmc_faq_slider.faq.settings import (
    ACCELERATOR_SIZES,
    CPU_SIZES,
    GateLimits,
    Selector,
    Settings,
)
from llmc_faq_slider.faq.store import Store
from llmc_faq_slider.host.calibration_data import (
    Handoff,
    count_weights,
    full_precision,
    plain_weights,
)
from llmc_faq_slider.host.saved_recipe import make_recipe_loadable

__all__ = ["FAQModifier"]

CACHE_VARIABLE = "LLMC_FAQ_SLIDER_CACHE"


class FAQModifier(Modifier):
    """
    Regenerates the calibration data with a larger model of the same family (or with
    the model itself), in the spirit of "FAQ: Mitigating Quantization Error via
    Regenerating Calibration Data with Family-Aware Quantization"
    (https://arxiv.org/abs/2601.11200). Every later stage of the recipe calibrates on
    the new data, whether oneshot was given a data set or not.

    Only the outline of the method is public. Group size, score, prompts, gates and
    sizes are choices of this package. Departure: an answer cut off at the token limit
    is no failure; it competes below every finished one, because short limits, which a
    run without an accelerator needs, cut many answers off.

    Sample yaml:

    ```yaml
    calibration_stage:
      calibration_modifiers:
        FAQModifier:
          generator: self
          num_candidates: 4
          num_samples: 32
          sequence_length: 512
    ```

    Lifecycle:

    - on_initialize
        - take hold of the calibration data loader, or stand in for a missing one
    - on_calibration_start
        - regenerate the data, or read it from disk if nothing changed
        - exchange the loader's rows in place, so only later stages see them
    - on_finalize
        - put the loader back as it was

    :param generator: who writes the candidates: ``self``, or folder or hub id of a
        larger model with the same tokenizer. Default ``self``
    :param seeds: what to regenerate: a json, jsonl, txt or parquet file, the name of a
        data set on a hub, or ``shipped`` for the package's own prompts. None, the
        default, means the data set given to oneshot if any, else ``shipped``
    :param seeds_split: split of a hub data set. Default "train"
    :param num_candidates: candidates per prompt (G). Default 4
    :param num_samples: rows of the calibration set (N). None: 128 with an
        accelerator, 32 without
    :param sequence_length: tokens of each row (L). None: 2048 with an accelerator, 512
        without; never more than the model's context
    :param max_new_tokens: longest answer in tokens. None: 1024 with an accelerator,
        256 without
    :param temperature: sampling temperature, above 0. None: the generator's own, else
        0.7 (0.6 if its template has a thinking mode)
    :param top_p: nucleus share in (0, 1]. None: the generator's own, else 0.8 (0.95)
    :param top_k: most likely ids to draw from, 0 for all. None: the generator's own,
        else 20
    :param batch_size: prompts per generation batch. None: 64 with an accelerator, 72
        without
    :param selector: who wins a group: ``expert_nll`` (highest mean log-probability
        under the generator), ``random`` or ``longest``
    :param chain_of_thought: have the reasoning written before the answer, by the
        template's thinking mode or in words. Default True
    :param enable_thinking: thinking switch of the chat template. None: on for
        chain of thought if the template has the switch
    :param min_response_tokens: gate, shortest valid answer. Default 32
    :param max_zlib_ratio: gate, raw over compressed size of texts from 1 kB. Default 4
    :param max_repeated_share: gate, share of repeated 8-token runs. Default 0.2
    :param accept_truncated: let cut-off answers compete, below all finished ones.
        Default True
    :param max_fallback_fraction: share of prompts without valid answer above which
        the run fails. Default 0.1
    :param cache_dir: folder for candidates, data sets and manifests. None: folder
        ``faq`` in the folder the environment variable LLMC_FAQ_SLIDER_CACHE names, else
        in ~/.cache/llmc_faq_slider
    :param seed: seed of sampling, prompt order and row order. Default 0
    """

    generator: str = Field(default="self", min_length=1)
    seeds: str | None = None
    seeds_split: str | None = None
    num_candidates: int = Field(default=4, ge=1, le=64)
    num_samples: int | None = Field(default=None, ge=1)
    sequence_length: int | None = Field(default=None, ge=8)
    max_new_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    batch_size: int | None = Field(default=None, ge=1)
    selector: Selector = "expert_nll"
    chain_of_thought: bool = True
    enable_thinking: bool | None = None
    min_response_tokens: int = Field(default=32, ge=1)
    max_zlib_ratio: float = Field(default=4.0, gt=1)
    max_repeated_share: float = Field(default=0.2, ge=0, le=1)
    accept_truncated: bool = True
    max_fallback_fraction: float = Field(default=0.1, ge=0, le=1)
    cache_dir: str | None = None
    seed: int = 0

    _handoff: Handoff | None = PrivateAttr(default=None)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Take hold of the loader every pipeline of this run will read."""
        self._handoff = Handoff(kwargs.get("calib_data"))
        if state.data.calib is None:
            # SmoothQuant refuses to initialise without it
            state.data.calib = self._handoff.loader
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Regenerate the rows and hand them to the later stages.

        :raises ValueError: for unusable seeds, or a generator that is no larger sibling
        :raises RegenerationError: when too few answers are valid
        """
        assert self._handoff is not None
        tokenizer = _load_tokenizer(state.model)
        source = self._source(state.model, tokenizer)
        settings = self._settings(state.model, source)
        seeds = self._seeds(tokenizer)
        result = regenerate(seeds, tokenizer, source, settings, Store(self._root()))
        self._handoff.swap(result.input_ids)
        state.data.calib = self._handoff.loader

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Put the loader back as it was."""
        make_recipe_loadable()
        if self._handoff is not None:
            self._handoff.release()
            self._handoff = None
        return True

    def _seeds(self, tokenizer: PreTrainedTokenizerBase) -> list[Seed]:
        assert self._handoff is not None
        if self.seeds is None and self._handoff.given:
            return seeds_from_rows(self._handoff.loader, tokenizer)
        if self.seeds is None or self.seeds == "shipped":
            return shipped_seeds()
        return load_seeds(self.seeds, self.seeds_split)

    def _source(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> GeneratorSource:
        if self.generator == "self":
            fingerprint = weights_fingerprint(plain_weights(model))
            plain = partial(full_precision, model)
            return self_source(model, tokenizer, fingerprint, plain)
        size = count_weights(model)
        return sibling_source(self.generator, model.config, tokenizer, size)

    def _settings(self, model: PreTrainedModel, source: GeneratorSource) -> Settings:
        """Fill in what was left open, and say so."""
        accelerated = torch.accelerator.is_available()
        sizes = ACCELERATOR_SIZES if accelerated else CPU_SIZES
        length = self.sequence_length or sizes["length"]
        context = context_length(model.config)
        settings = Settings(
            num_candidates=self.num_candidates,
            num_samples=self.num_samples or sizes["rows"],
            sequence_length=min(length, context or length),
            sampling=resolve_sampling(
                source,
                self.max_new_tokens or sizes["new"],
                self.temperature,
                self.top_p,
                self.top_k,
            ),
            batch_size=self.batch_size or sizes["batch"],
            selector=self.selector,
            gates=GateLimits(
                self.min_response_tokens,
                self.max_zlib_ratio,
                self.max_repeated_share,
                self.accept_truncated,
            ),
            max_fallback_fraction=self.max_fallback_fraction,
            chain_of_thought=self.chain_of_thought,
            enable_thinking=self.enable_thinking,
            seed=self.seed,
        )
        logger.info(
            f"FAQ: {settings.num_samples} rows x {settings.sequence_length} tokens, "
            f"{settings.num_candidates} candidates of at most "
            f"{settings.sampling.max_new_tokens} tokens per prompt, generator "
            f"{self.generator} ({'accelerator' if accelerated else 'CPU'})"
        )
        return settings

    def _root(self) -> str:
        if self.cache_dir is not None:
            return self.cache_dir
        base = os.environ.get(CACHE_VARIABLE) or "~/.cache/llmc_faq_slider"
        return os.path.join(base, "faq")


def _load_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    name = model.config.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"FAQModifier needs the model's tokenizer and finds none at {name!r} "
            f"({error}). Load the model from a folder or hub id that has one."
        ) from error
    if template_text(tokenizer) is None:
        logger.warning(
            f"FAQ: {name} has no chat template; seeds are continued as plain text"
        )
    return tokenizer
