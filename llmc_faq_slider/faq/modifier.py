"""FAQ as a recipe stage: lifecycle and calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from typing import Any

from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmc_faq_slider.faq.assembly import (
    Target,
    load_tokenizer,
    produce,
    warn_without_template,
)
from llmc_faq_slider.faq.competition import losses
from llmc_faq_slider.faq.identity import weights_fingerprint
from llmc_faq_slider.faq.options import FAQOptions
from llmc_faq_slider.host.calibration_data import (
    Handoff,
    count_weights,
    full_precision,
    plain_weights,
)
from llmc_faq_slider.host.saved_keys import save_experts_as_read
from llmc_faq_slider.host.saved_recipe import make_recipe_loadable
from llmc_faq_slider.processes import refuse_many_processes

__all__ = ["FAQModifier", "tokenizer_given"]

#: tokenizer, processor or name of one that ``oneshot`` was given, while it runs
_GIVEN: ContextVar[Any] = ContextVar("given_tokenizer", default=None)

#: entries of the data set's manifest that a run report repeats
_REPORTED = ("tokens", "answer_tokens", "counts", "gates")


class FAQModifier(FAQOptions, Modifier):
    """
    Regenerates the calibration data with a larger model of the same family (or with
    the model itself), in the spirit of "FAQ: Mitigating Quantization Error via
    Regenerating Calibration Data with Family-Aware Quantization"
    (https://arxiv.org/abs/2601.11200). Every later stage of the recipe calibrates on
    the new data, whether oneshot was given a data set or not. Its batches hold
    ``input_ids``, ``attention_mask`` and ``loss_mask`` (1 on the tokens the generator
    wrote).

    Only the outline of the method is public. Group size, score, prompts, gates and
    sizes are choices of this package. Departure: an answer cut off at the token limit
    is no failure; it competes below every finished one, because short limits, which a
    run without an accelerator needs, cut many answers off.

    The fields are those of :class:`llmc_faq_slider.faq.options.FAQOptions`.

    Sample yaml:

    ```yaml
    calibration_stage:
      calibration_modifiers:
        FAQModifier:
          generator: self
          num_candidates: 4
          selector: expert_judge
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
    """

    _handoff: Handoff | None = PrivateAttr(default=None)
    _report: dict[str, Any] = PrivateAttr(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """
        The last run's data set, JSON-like: its folder's name below ``datasets`` of the
        cache, sizes, the manifest's counts, and warnings. Empty before a run.
        """
        return self._report

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Take hold of the loader every pipeline of this run will read."""
        refuse_many_processes()
        self._handoff = Handoff(kwargs.get("calib_data"))
        if state.data.calib is None:
            # SmoothQuant refuses to initialise without it
            state.data.calib = self._handoff.loader
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Regenerate the rows and hand them to the later stages.

        :raises ValueError: for unusable seeds, a generator that is no larger sibling,
            or a server the seeds may not be sent to
        :raises EndpointError: when a server cannot be used
        :raises RegenerationError: when too few answers are valid
        :raises FolderBusyError: while another process makes the same candidates
        """
        assert self._handoff is not None
        rows = self._handoff.loader if self._handoff.given else None
        result = produce(self, _target(state.model), rows)
        sentence = losses(result.manifest["counts"])
        self._report = {
            "dataset": result.folder.name,
            "rows": len(result.input_ids),
            **{name: result.manifest[name] for name in _REPORTED},
            "warnings": [sentence] if sentence else [],
        }
        self._handoff.swap(result.input_ids, result.loss_mask, state.model)
        state.data.calib = self._handoff.loader

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Put the loader back as it was."""
        make_recipe_loadable()
        save_experts_as_read(state.model)
        if self._handoff is not None:
            self._handoff.release()
            self._handoff = None
        return True


@contextmanager
def tokenizer_given(given: Any) -> Iterator[None]:
    """
    Context in which the stage writes its data with this tokenizer.

    :param given: a tokenizer, a processor that has one, the folder or hub id of one,
        or None for that of the model's own folder
    """
    token = _GIVEN.set(given)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    given = _GIVEN.get()
    if given is None or isinstance(given, str | PathLike):
        return load_tokenizer(str(given or name))
    tokenizer = getattr(given, "tokenizer", given)
    warn_without_template(tokenizer, name)
    return tokenizer


def _target(model: PreTrainedModel) -> Target:
    name = model.config.name_or_path

    @contextmanager
    def opened() -> Iterator[PreTrainedModel]:
        was_training = model.training
        with full_precision(model):
            model.eval()
            yield model
            model.train(was_training)

    return Target(
        name=name,
        config=model.config,
        tokenizer=_tokenizer(name),
        defaults=model.generation_config or GenerationConfig(),
        size=lambda: count_weights(model),
        fingerprint=lambda: weights_fingerprint(plain_weights(model)),
        open=opened,
    )
