"""``SliderQuantModifier``: sliding-window learned quantisation as a recipe stage."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from pydantic import Field, NonNegativeInt, PrivateAttr, model_validator
from torch import Tensor, nn

from llmc_faq_slider.host.checks import (
    check_data,
    check_learning_stage,
    check_other_stages,
    check_turn,
)
from llmc_faq_slider.host.commit import LayerCommits
from llmc_faq_slider.host.decoder import (
    calibration_samples,
    counted_tokens,
    unquantized,
)
from llmc_faq_slider.host.gradients import learnable_weights, with_gradients
from llmc_faq_slider.host.grids import needs_pack_quantized
from llmc_faq_slider.host.group_sizes import check_group_sizes
from llmc_faq_slider.host.kept_state import holds_committed, keep, take_up
from llmc_faq_slider.host.postconditions import (
    check_committed,
    check_finite,
    check_folds,
    check_losses,
    check_weights,
    conclude,
)
from llmc_faq_slider.host.run_identity import (
    run_fingerprint,
    stage_folder,
    stage_position,
)
from llmc_faq_slider.host.saved_keys import save_experts_as_read
from llmc_faq_slider.host.saved_recipe import make_recipe_loadable
from llmc_faq_slider.host.serving_check import check_serving
from llmc_faq_slider.host.targets import TargetedLayers, targeted_layers
from llmc_faq_slider.processes import refuse_many_processes
from llmc_faq_slider.products import ComputeDtype, multiplied_in, product_dtype
from llmc_faq_slider.removed import refuse_removed
from llmc_faq_slider.slider.checkpoint import open_checkpoint
from llmc_faq_slider.slider.closing import (
    ClosingSettings,
    tune_scales,
)
from llmc_faq_slider.slider.end_windows import end_windows
from llmc_faq_slider.slider.head import OutputHead, missing_distribution
from llmc_faq_slider.slider.idle import find_idle
from llmc_faq_slider.slider.interruption import stop_on_signals
from llmc_faq_slider.slider.learner import (
    Learned,
    LearningSettings,
    WindowResult,
    learn_windows,
    stage_ratios,
)
from llmc_faq_slider.slider.loss import CountedTokens
from llmc_faq_slider.slider.memory import row_limit
from llmc_faq_slider.slider.outcome import Outcome, foreseen, remarks
from llmc_faq_slider.slider.stream import capture_decoder, pass_rows
from llmc_faq_slider.slider.windows import Window, window_schedule

__all__ = ["SliderQuantModifier"]

# Fields that a preset sets where the recipe does not.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"epochs": 1, "closing_epochs": 0},
    "default": {"epochs": 1, "closing_epochs": 1},
    "best": {"epochs": 4, "closing_epochs": 2, "ratio": 0.5},
}


class SliderQuantModifier(Modifier, QuantizationMixin):
    """
    Learned post-training quantisation in windows that slide over the decoder layers
    (SliderQuant, https://arxiv.org/abs/2603.25284). Growing windows cover the shallow
    layers, windows of fixed size the middle, shrinking windows the deep layers. Each
    window learns a low-rank weight update, clipping of the weight ranges and channel
    scales, so that its quantised output matches full precision, and everything folds
    into plain weights, scales and zero points.

    Schemes: integer weights of 2 to 8 bits, symmetric or asymmetric, per channel or per
    group; inputs unquantised, or dynamic per token in int8, int4 or fp8. Formats are
    written as in every llm-compressor stage, by ``scheme`` or ``config_groups``. Where
    ``format`` is not given, integer weights below 8 bits are saved ``pack-quantized``.

    Sample yaml:

    ```yaml
    quant_stage:
      slider_modifiers:
        SliderQuantModifier:
          targets: ["Linear"]
          ignore: ["lm_head"]
          scheme: W4A16
          epochs: 10
          batch_size: 4
    ```

    Lifecycle:

    - on_initialize
        - check the recipe and the targets
        - attach schemes to modules
    - on_calibration_start
        - read the calibration rows that stand at this point of the recipe
        - run one through the whole model, and refuse what would end the run late
        - learn window after window, commit each layer after its last visit
        - check the result
    - on_calibration_end
        - freeze the modules' quantisation

    :param shallow_layers: number of growing windows L_s, 0 for none; ``auto`` measures
        on some calibration rows what quantising each layer alone does to the output,
        and takes as many as the first layers stand out. None: 4 as in the paper, but
        at most a quarter of the layers (docs/experiments.md)
    :param deep_layers: number of shrinking windows L_d, 0 for none; ``auto`` and None
        as above, for the last layers
    :param window_size: layers per fixed window s
    :param window_stride: layers by which a fixed window moves, i
    :param ratio: intra-layer ratio γ; a window is trained in 1/γ stages that quantise
        γ, 2γ, ... of the input channels of every matrix, with at least one epoch each.
        Default 1.0, one stage, for one epoch; with more epochs the paper's 0.5 gains,
        and the preset ``best`` takes it (docs/experiments.md)
    :param preset: ``fast``, ``default`` or ``best``: ``epochs``, ``closing_epochs`` and
        ``ratio`` where they are not given. The saved recipe.yaml records the numbers
    :param epochs: passes over the calibration rows per window, shared by its stages.
        More rows gain more than more passes (docs/experiments.md)
    :param closing_epochs: passes in which all scales are tuned together on the model's
        next-token distribution, after the last window; 0 for none, as for a model that
        has no such distribution. A departure from the paper
    :param closing_lr: AdamW's first learning rate for the factors on the scales, in
        grid steps of a linear's largest code (2, 4 and 8 steps from zero at 2, 3 and 4
        bits): a rate that suits two bits would shake four-bit weights apart
    :param batch_size: calibration rows per optimiser step
    :param low_rank: rank of the weight update, 0 for none
    :param rounding_travel: how far the offset of a weight before rounding travels in
        its first window if all gradients are of their usual size and one sign, in steps
        of the weight grid; 0 learns no offsets. A departure from the paper; 0.2 won in
        docs/experiments.md
    :param quantized_inputs: learn on inputs quantised as they will be served. ``auto``
        does so below 8 bits: what 8 bits leave out is noise to a window, and costs it
        2 to 4 % in divergence (docs/experiments.md)
    :param channel_scales: learn channel scales where they fold exactly. ``auto`` does
        so in layers that learn on quantised inputs: for weights alone they cost a fifth
        of the time and change nothing (docs/experiments.md)
    :param smoothing_strength: where channel scales start: 0 at one, 1 where all input
        channels are of one size, between them as in SmoothQuant. ``auto`` is 0.7 for
        inputs below 8 bits, else 0. A departure from the paper, which starts at one; at
        four-bit inputs it is worth more than all else (docs/experiments.md)
    :param low_rank_lr: AdamW's first learning rate for the low-rank update
    :param clipping_lr: the same for the clipping logits
    :param channel_scale_lr: the same for the channel scales
    :param visit_decay: a layer's rates at its k-th visit are k^-visit_decay of these; 0
        keeps them, as the paper does. Layers at the ends, which four windows learn,
        otherwise learn the calibration text by heart (docs/experiments.md)
    :param compute_dtype: dtype of matrix products, ``auto`` the faster one: float32 on
        CPUs that multiply bf16 slowly, else bfloat16. Learned tensors, loss and
        rounding are always fp32. On a CPU float32 holds for all products of the stage,
        also in the layers as they were and in the head; otherwise it is the student's,
        and the rest multiplies in the model's own
    :param seed: seeds the low-rank starts and the order of rows
    :param loss_on_responses: errors count only on tokens that the calibration data's
        ``loss_mask`` marks as responses, as FAQ's does; rows without one count fully
    :param checkpoint_dir: folder in which a state is saved after every window and every
        epoch of the closing pass. The same command goes on from there after a kill, and
        ends with the same bits. None: that of the environment variable
        LLMC_FAQ_SLIDER_CHECKPOINT_DIR, or nothing is saved until the end fails
    :param strict: a result that fails a check fails the run; false makes warnings of
        these, listed in ``warnings``
    :param target: hardware that vLLM has to serve the checkpoint on, such as sm90, or
        cpu for this machine's; the run stops at once if it has no kernel there. None: a
        warning if no known hardware serves a config group as declared
    """

    shallow_layers: Literal["auto"] | NonNegativeInt | None = None
    deep_layers: Literal["auto"] | NonNegativeInt | None = None
    window_size: int = Field(default=2, ge=1)
    window_stride: int = Field(default=1, ge=1)
    ratio: float = Field(default=1.0, gt=0, le=1)
    preset: Literal["fast", "default", "best"] = "default"
    epochs: int = Field(default=PRESETS["default"]["epochs"], ge=1)
    closing_epochs: int = Field(default=PRESETS["default"]["closing_epochs"], ge=0)
    closing_lr: float = Field(default=6e-3, gt=0)
    batch_size: int = Field(default=4, ge=1)
    low_rank: int = Field(default=4, ge=0)
    rounding_travel: float = Field(default=0.2, ge=0)
    quantized_inputs: bool | Literal["auto"] = "auto"
    channel_scales: bool | Literal["auto"] = "auto"
    smoothing_strength: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    low_rank_lr: float = Field(default=1e-2, ge=0)
    clipping_lr: float = Field(default=1e-2, ge=0)
    channel_scale_lr: float = Field(default=3e-3, ge=0)
    visit_decay: float = Field(default=1.0, ge=0)
    compute_dtype: ComputeDtype = "auto"
    seed: int = 0
    loss_on_responses: bool = False
    checkpoint_dir: str | None = None
    strict: bool = True
    target: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, fields: Any) -> Any:
        """Fields that the recipe leaves out take the preset's values."""
        refuse_removed("SliderQuantModifier", fields)
        if isinstance(fields, dict):
            return PRESETS.get(fields.get("preset", "default"), {}) | fields
        return fields

    @model_validator(mode="after")
    def _an_epoch_for_every_stage(self) -> Self:
        stages = len(stage_ratios(self.ratio))
        if self.epochs < stages:
            raise ValueError(
                f"ratio {self.ratio:g} trains each window in {stages} stages, which "
                f"need at least {stages} epochs, and epochs is {self.epochs}; "
                "give it more epochs or ratio 1.0"
            )
        return self

    _sequential_targets: str | list[str] | None = PrivateAttr(default=None)
    _folder: Path | None = PrivateAttr(default=None)
    _position: int = PrivateAttr(default=1)
    _outcome: Outcome | None = PrivateAttr(default=None)

    @property
    def results(self) -> list[WindowResult]:
        """What each window of the last run reached."""
        return self._outcome.windows if self._outcome else []

    @property
    def warnings(self) -> list[str]:
        """
        Of the last run: idle experts, a closing pass that was left out, windows and
        closing passes that kept their start or began anew, and with ``strict: false``
        what the checks of the result found.
        """
        return self._outcome.warnings if self._outcome else []

    def report(self) -> dict[str, Any]:
        """
        The last run, JSON-like: rows, tokens, windows with their losses and seconds,
        closing pass, idle experts, warnings. Empty before a run.
        """
        return self._outcome.record() if self._outcome else {}

    def resolve_quantization_config(self) -> QuantizationConfig:
        """The recipe's scheme, with the format that vLLM's kernels need."""
        config = super().resolve_quantization_config()
        for scheme in config.config_groups.values():
            assert isinstance(scheme, QuantizationScheme)
            if needs_pack_quantized(scheme):
                scheme.format = "pack-quantized"
        return config

    @with_gradients
    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        refuse_many_processes()
        check_learning_stage(self, self.window_size, self.window_stride)
        check_serving(self, self.target)
        check_other_stages(state.model, self)
        check_weights(state.model)
        self._position = stage_position(self)
        self._folder = stage_folder(self.checkpoint_dir, self._position)
        self._sequential_targets = kwargs.get("sequential_targets")
        check_group_sizes(self, state.model)
        self.initialize_quantization(state.model)
        targeted_layers(state.model, self, self._sequential_targets)
        return True

    @with_gradients
    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        check_turn(self)
        check_data(state)
        check_weights(state.model)
        model: nn.Module = state.model
        learnable_weights(model)
        rows, masks = calibration_samples(state.data.calib)
        tokens = self._tokens(rows, masks)
        served = targeted_layers(model, self, self._sequential_targets)
        layers = served.for_learning(self.quantized_inputs)
        device = get_main_device()
        dtype = product_dtype(self.compute_dtype, device)
        with unquantized(model), multiplied_in(dtype, device):
            self._learn(model, served, layers, rows, tokens, device, dtype)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.end_calibration(state.model)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        make_recipe_loadable()
        save_experts_as_read(state.model)
        return True

    def _learn(
        self,
        model: nn.Module,
        served: TargetedLayers,
        layers: TargetedLayers,
        rows: list[Tensor],
        tokens: CountedTokens,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """
        Windows, then the closing pass; both commit what they learn, and it is checked.

        :param served: layers with the number formats of the checkpoint
        :param layers: the same with those that are learned on
        """
        hidden, calls = capture_decoder(
            model, layers.modules, rows, device, layers.modules_by_layer()
        )
        windows = self._windows(model, served, rows)
        missing = missing_distribution(model, calls) if self.closing_epochs else None
        closes = self.closing_epochs > 0 and missing is None
        limit = row_limit(
            model,
            map(layers.of, windows),
            max(tokens.lengths),
            self.batch_size,
            closes,
            device,
        )
        idle = find_idle(calls, hidden, layers.modules_by_layer(), limit)
        said = foreseen(missing, idle, sum(tokens.lengths))
        fingerprint = run_fingerprint(model, self, rows, tokens.masks, windows, dtype)
        commits = LayerCommits(layers, closes)
        with ExitStack() as stack:
            saved = stop = None
            if self._folder is not None:
                saved = stack.enter_context(open_checkpoint(self._folder, fingerprint))
                stop = stack.enter_context(stop_on_signals())
            closing = None
            if saved is not None and holds_committed(saved):
                every = range(len(layers.modules) if closes else 0)
                outputs = limit.run(lambda: pass_rows(calls, every, hidden, limit.rows))
                learned, closing = take_up(saved, commits, outputs)
            else:
                learned = learn_windows(
                    calls,
                    hidden,
                    layers.grids,
                    windows,
                    self._settings(dtype),
                    device,
                    commits.layer,
                    tokens,
                    limit,
                    saved,
                    stop,
                )
            keeping = partial(
                keep, self._folder, self._position, fingerprint, commits, learned
            )
            if closes and closing is None:
                try:
                    closing = tune_scales(
                        calls,
                        OutputHead(model, calls),
                        commits.tuned,
                        hidden,
                        learned.outputs,
                        self._closing_settings(dtype),
                        device,
                        tokens,
                        limit,
                        saved,
                        stop,
                    )
                except Exception as error:
                    raise RuntimeError(
                        f"The closing pass failed: {error}\n"
                        + keeping(None, "closing_epochs: 0")
                    ) from error
                if not closing.kept_start:
                    commits.tuned_scales()
            if stop is not None and stop.requested:
                logger.warning("SliderQuant: stopped; this stage is done and saved.")
                raise stop.exit()
        said += [*learned.left_out, *remarks(learned.windows, closing)]
        self._outcome = Outcome(
            len(rows), sum(tokens.lengths), learned.windows, closing, said, idle
        )
        problems = _problems(model, layers, commits, learned, hidden[0].dtype)
        if problems and self.strict:
            problems.append(keeping(closing, "strict: false"))
        self._outcome.warnings += conclude(problems, self.strict)

    def _tokens(self, rows: list[Tensor], masks: list[Tensor | None]) -> CountedTokens:
        if self.loss_on_responses:
            return counted_tokens(rows, masks)
        return CountedTokens.all([len(row) for row in rows])

    def _windows(
        self,
        model: nn.Module,
        layers: TargetedLayers,
        rows: list[Tensor],
    ) -> list[Window]:
        shallow, deep = end_windows(
            self.shallow_layers,
            self.deep_layers,
            model,
            layers.modules,
            rows,
            layers.grids,
            get_main_device(),
        )
        windows = window_schedule(
            len(layers.modules), shallow, deep, self.window_size, self.window_stride
        )
        logger.info(
            f"SliderQuant: {len(layers.linears)} linears in {len(layers.modules)} "
            f"layers, {len(windows)} windows, {sum(map(len, rows))} calibration tokens "
            f"in {len(rows)} rows"
        )
        return windows

    def _settings(self, dtype: torch.dtype) -> LearningSettings:
        return LearningSettings(
            ratio=self.ratio,
            epochs=self.epochs,
            batch_size=self.batch_size,
            low_rank=self.low_rank,
            rounding_travel=self.rounding_travel,
            channel_scales=self.channel_scales,
            smoothing_strength=self.smoothing_strength,
            learning_rates={
                "low_rank": self.low_rank_lr,
                "clipping": self.clipping_lr,
                "channel_scale": self.channel_scale_lr,
            },
            visit_decay=self.visit_decay,
            compute_dtype=dtype,
            seed=self.seed,
        )

    def _closing_settings(self, dtype: torch.dtype) -> ClosingSettings:
        return ClosingSettings(
            epochs=self.closing_epochs,
            learning_rate=self.closing_lr,
            batch_size=self.batch_size,
            compute_dtype=dtype,
            seed=self.seed,
        )


def _problems(
    model: nn.Module,
    layers: TargetedLayers,
    commits: LayerCommits,
    learned: Learned,
    dtype: torch.dtype,
) -> list[str]:
    """
    What does not hold of the result.

    :param dtype: of the hidden states
    """
    return [
        *check_committed(layers.linears, commits.names()),
        *check_finite(model),
        *check_losses(learned.windows),
        *check_folds(learned.fold_errors, layers.by_name(), dtype),
    ]
