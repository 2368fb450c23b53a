"""``SliderQuantModifier``: sliding-window learned quantisation as a recipe stage."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import DisableQuantization
from loguru import logger
from pydantic import Field, NonNegativeInt, PrivateAttr, model_validator
from torch import Tensor, nn

from llmc_faq_slider.host.checks import (
    check_learning_stage,
    check_other_stages,
    check_turn,
    outside_layers,
    targeted_linears,
)
from llmc_faq_slider.host.commit import commit_layer
from llmc_faq_slider.host.decoder import (
    calibration_samples,
    counted_tokens,
    decoder_layers,
    split_targets,
)
from llmc_faq_slider.host.grids import linear_grids, needs_pack_quantized
from llmc_faq_slider.host.postconditions import (
    check_committed,
    check_finite,
    check_folds,
    check_losses,
    check_seen,
    conclude,
)
from llmc_faq_slider.host.run_identity import (
    run_fingerprint,
    stage_folder,
    stage_position,
)
from llmc_faq_slider.host.saved_recipe import make_recipe_loadable
from llmc_faq_slider.host.serving_check import check_serving
from llmc_faq_slider.slider.checkpoint import Checkpoint, open_checkpoint
from llmc_faq_slider.slider.closing import ClosingSettings, TunedLinear, tune_scales
from llmc_faq_slider.slider.head import OutputHead, frozen
from llmc_faq_slider.slider.interruption import StopRequest, stop_on_signals
from llmc_faq_slider.slider.learner import (
    LearningSettings,
    WindowResult,
    learn_windows,
)
from llmc_faq_slider.slider.loss import CountedTokens
from llmc_faq_slider.slider.memory import RowLimit, row_limit
from llmc_faq_slider.slider.proposal import propose_windows
from llmc_faq_slider.slider.sensitivity import (
    measure_sensitivity,
    sample_rows,
)
from llmc_faq_slider.slider.stream import DecoderCalls, capture_decoder
from llmc_faq_slider.slider.student import FoldedLayer, LinearGrids
from llmc_faq_slider.slider.windows import window_schedule

__all__ = ["SliderQuantModifier"]

# Fields that a preset sets where the recipe does not.
PRESETS: dict[str, dict[str, int]] = {
    "fast": {"epochs": 1, "closing_epochs": 0},
    "default": {"epochs": 2, "closing_epochs": 1},
    "best": {"epochs": 6, "closing_epochs": 2},
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
        - learn window after window, commit each layer after its last visit
        - check the result
    - on_calibration_end
        - freeze the modules' quantisation

    :param shallow_layers: number of growing windows L_s, 0 for none; ``auto`` measures
        on some calibration rows what quantising each layer alone does to the output,
        and takes as many as the first layers stand out
    :param deep_layers: number of shrinking windows L_d, 0 for none; ``auto`` as above,
        for the last layers
    :param window_size: layers per fixed window s
    :param window_stride: layers by which a fixed window moves, i
    :param ratio: intra-layer ratio γ; a window is trained in 1/γ stages that quantise
        γ, 2γ, ... of the input channels of every matrix. Default 1.0, one stage: the
        paper's 0.5 loses at equal epochs in docs/experiments.md
    :param stage_order: ``window`` runs all stages inside each window (the paper);
        ``sweep`` runs one pass over all windows per stage (the released code), and
        keeps the learned tensors of all layers in memory
    :param preset: ``fast``, ``default`` or ``best``: how many epochs, where
        ``epochs`` and ``closing_epochs`` are not given. The saved recipe.yaml records
        the numbers
    :param epochs: passes over the calibration rows per window, shared by its stages
    :param closing_epochs: passes in which all scales are tuned together on the model's
        next-token distribution, after the last window; 0 for none. A departure from the
        paper
    :param closing_lr: AdamW's first learning rate for the factors on the scales
    :param batch_size: calibration rows per optimiser step
    :param low_rank: rank of the weight update, 0 for none
    :param rounding_travel: how far the offset of a weight before rounding can travel in
        one window, in steps of the weight grid; 0 learns no offsets. A departure from
        the paper; 0.2 won in docs/experiments.md
    :param channel_scales: learn channel scales where they fold exactly. ``auto`` does
        so in layers with quantised inputs: for weights alone they cost a fifth of the
        time and change nothing (docs/experiments.md)
    :param low_rank_lr: AdamW's first learning rate for the low-rank update
    :param clipping_lr: the same for the clipping logits
    :param channel_scale_lr: the same for the channel scales
    :param compute_dtype: dtype of the student's matrix products; learned tensors, loss
        and rounding are always fp32
    :param seed: seeds the low-rank starts and the order of rows
    :param loss_on_responses: errors count only on tokens that the calibration data's
        ``loss_mask`` marks as responses, as FAQ's does; rows without one count fully
    :param checkpoint_dir: folder in which a state is saved after every window and every
        epoch of the closing pass. The same command goes on from there after a kill, and
        ends with the same bits. None: that of the environment variable
        LLMC_FAQ_SLIDER_CHECKPOINT_DIR, or nothing is saved
    :param strict: a result that fails a check fails the run; false makes warnings of
        these, listed in ``warnings``
    :param target: hardware that vLLM has to serve the checkpoint on, such as sm90 or
        cpu; the run stops at once if it has no kernel there. None: a warning if no
        known hardware serves a config group as declared
    """

    shallow_layers: Literal["auto"] | NonNegativeInt = 4
    deep_layers: Literal["auto"] | NonNegativeInt = 4
    window_size: int = Field(default=2, ge=1)
    window_stride: int = Field(default=1, ge=1)
    ratio: float = Field(default=1.0, gt=0, le=1)
    stage_order: Literal["window", "sweep"] = "window"
    preset: Literal["fast", "default", "best"] = "default"
    epochs: int = Field(default=PRESETS["default"]["epochs"], ge=1)
    closing_epochs: int = Field(default=PRESETS["default"]["closing_epochs"], ge=0)
    closing_lr: float = Field(default=3e-3, gt=0)
    batch_size: int = Field(default=4, ge=1)
    low_rank: int = Field(default=4, ge=0)
    rounding_travel: float = Field(default=0.2, ge=0)
    channel_scales: bool | Literal["auto"] = "auto"
    low_rank_lr: float = Field(default=1e-2, ge=0)
    clipping_lr: float = Field(default=1e-2, ge=0)
    channel_scale_lr: float = Field(default=3e-3, ge=0)
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0
    loss_on_responses: bool = False
    checkpoint_dir: str | None = None
    strict: bool = True
    target: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, fields: Any) -> Any:
        """Fields that the recipe leaves out take the preset's values."""
        if isinstance(fields, dict):
            return PRESETS.get(fields.get("preset", "default"), {}) | fields
        return fields

    _sequential_targets: str | list[str] | None = PrivateAttr(default=None)
    _results: list[WindowResult] = PrivateAttr(default_factory=list)
    _warnings: list[str] = PrivateAttr(default_factory=list)
    _folder: Path | None = PrivateAttr(default=None)

    @property
    def results(self) -> list[WindowResult]:
        """What each window of the last run reached."""
        return self._results

    @property
    def warnings(self) -> list[str]:
        """What the last run's checks found, with ``strict: false``."""
        return self._warnings

    def resolve_quantization_config(self) -> QuantizationConfig:
        """The recipe's scheme, with the format that vLLM's kernels need."""
        config = super().resolve_quantization_config()
        for scheme in config.config_groups.values():
            assert isinstance(scheme, QuantizationScheme)
            if needs_pack_quantized(scheme):
                scheme.format = "pack-quantized"
        return config

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        check_learning_stage(self, self.window_size, self.window_stride)
        check_serving(self, self.target)
        check_other_stages(state.model, self)
        self._check_weights(state.model)
        self._folder = stage_folder(self.checkpoint_dir, stage_position(self))
        self._sequential_targets = kwargs.get("sequential_targets")
        self.initialize_quantization(state.model)
        self._grids(state.model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        check_turn(self)
        model: nn.Module = state.model
        if state.data is None or state.data.calib is None:
            raise ValueError(
                "SliderQuantModifier needs calibration data and found none. Give "
                "oneshot a data set, or put a FAQModifier before it."
            )
        self._check_weights(model)
        rows, masks = calibration_samples(state.data.calib)
        if not self.loss_on_responses:
            masks = [None] * len(rows)
        named = decoder_layers(model, self._sequential_targets)
        layers = [layer for _, layer in named]
        grids = self._grids(model)
        targets = targeted_linears(model, self)
        committed: set[nn.Module] = set()
        tuned: dict[int, dict[str, TunedLinear]] = {}

        def commit(index: int, folded: FoldedLayer) -> None:
            commit_layer(layers[index], folded)
            committed.update(layers[index].get_submodule(n) for n in folded.linears)
            if self.closing_epochs:
                tuned[index] = {
                    name: TunedLinear(
                        layers[index].get_submodule(name), grids[index][name], linear
                    )
                    for name, linear in folded.linears.items()
                }

        device = get_main_device()
        training = model.training
        model.eval()
        with DisableQuantization(model), frozen(model), ExitStack() as stack:
            hidden, calls = capture_decoder(model, layers, rows, device)
            windows = window_schedule(
                len(layers),
                *self._end_windows(model, layers, rows, grids, device),
                self.window_size,
                self.window_stride,
            )
            logger.info(
                f"SliderQuant: {len(targets)} linears in {len(layers)} layers, "
                f"{len(windows)} windows, {sum(map(len, rows))} calibration tokens in "
                f"{len(rows)} rows"
            )
            tokens = (
                counted_tokens(rows, masks)
                if self.loss_on_responses
                else CountedTokens.all([len(row) for row in rows])
            )
            limit = row_limit(
                model,
                [[(layers[i], grids.get(i, {})) for i in w.layers] for w in windows],
                max(map(len, rows)),
                self.batch_size,
                self.closing_epochs > 0,
                device,
            )
            saved = stop = None
            if self._folder is not None:
                fingerprint = run_fingerprint(model, self, rows, masks, windows)
                saved = stack.enter_context(open_checkpoint(self._folder, fingerprint))
                stop = stack.enter_context(stop_on_signals())
            learned = learn_windows(
                calls,
                hidden,
                grids,
                windows,
                self._settings(),
                device,
                commit,
                tokens,
                limit,
                saved,
                stop,
            )
            self._results = learned.windows
            if self.closing_epochs:
                outputs = learned.outputs
                self._close(
                    calls,
                    OutputHead(model, calls, hidden[0].to(device)),
                    tuned,
                    hidden,
                    outputs,
                    device,
                    tokens,
                    limit,
                    saved,
                    stop,
                )
            if stop is not None and stop.requested:
                logger.warning("SliderQuant: stopped; this stage is done and saved.")
                raise stop.exit()
        model.train(training)
        names = [name for name, _ in named]
        self._warnings = conclude(
            [
                *check_committed(
                    targets, {n for n, m in targets.items() if m in committed}
                ),
                *check_finite(model),
                *check_losses(learned.windows),
                *check_folds(learned.fold_errors, grids, names, hidden[0].dtype),
                *check_seen(learned.unseen, names),
            ],
            self.strict,
        )

    def _close(
        self,
        calls: DecoderCalls,
        head: OutputHead,
        tuned: dict[int, dict[str, TunedLinear]],
        hidden: list[Tensor],
        outputs: list[Tensor],
        device: torch.device,
        tokens: CountedTokens,
        limit: RowLimit,
        saved: Checkpoint | None,
        stop: StopRequest | None,
    ) -> None:
        """Tune all scales together, and commit them."""
        settings = ClosingSettings(
            epochs=self.closing_epochs,
            learning_rate=self.closing_lr,
            batch_size=self.batch_size,
            compute_dtype=getattr(torch, self.compute_dtype),
            seed=self.seed,
        )
        result = tune_scales(
            calls,
            head,
            tuned,
            hidden,
            outputs,
            settings,
            device,
            tokens,
            limit,
            saved,
            stop,
        )
        logger.info(
            f"closing pass: divergence {result.start_loss:.4e} -> {result.loss:.4e}"
            + (", start kept" if result.kept_start else "")
        )
        if not result.kept_start:
            for index, linears in tuned.items():
                folded = {name: linear.fold() for name, linear in linears.items()}
                commit_layer(calls.layers[index], FoldedLayer(folded, {}))

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.end_calibration(state.model)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        make_recipe_loadable()
        return True

    def _grids(self, model: nn.Module) -> dict[int, dict[str, LinearGrids]]:
        """Number formats by layer index and name within the layer."""
        layers = decoder_layers(model, self._sequential_targets)
        inside, outside = split_targets(layers, targeted_linears(model, self))
        if outside:
            raise ValueError(outside_layers(outside))
        return {
            index: {name: linear_grids(module) for name, module in modules.items()}
            for index, modules in inside.items()
        }

    def _end_windows(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        rows: list[Tensor],
        grids: dict[int, dict[str, LinearGrids]],
        device: torch.device,
    ) -> tuple[int, int]:
        """Numbers of growing and shrinking windows, measured where they are auto."""
        shallow, deep = self.shallow_layers, self.deep_layers
        if shallow != "auto" and deep != "auto":
            return shallow, deep
        measured = measure_sensitivity(model, layers, sample_rows(rows), grids, device)
        values = [layer.kl for layer in measured.layers]
        proposal = propose_windows(values)
        logger.info(
            f"SliderQuant: sensitivity proposes {proposal.shallow_layers} shallow and "
            f"{proposal.deep_layers} deep layers; KL in nats per token when one layer "
            f"alone is quantised: {', '.join(f'{value:.2g}' for value in values)}"
        )
        return (
            proposal.shallow_layers if shallow == "auto" else shallow,
            proposal.deep_layers if deep == "auto" else deep,
        )

    def _check_weights(self, model: nn.Module) -> None:
        for problem in check_finite(model):
            raise ValueError(
                f"{problem} SliderQuant cannot learn from them: give it a model whose "
                "weights are whole."
            )

    def _settings(self) -> LearningSettings:
        return LearningSettings(
            ratio=self.ratio,
            stage_order=self.stage_order,
            epochs=self.epochs,
            batch_size=self.batch_size,
            low_rank=self.low_rank,
            rounding_travel=self.rounding_travel,
            channel_scales=self.channel_scales,
            learning_rates={
                "low_rank": self.low_rank_lr,
                "clipping": self.clipping_lr,
                "channel_scale": self.channel_scale_lr,
            },
            compute_dtype=getattr(torch, self.compute_dtype),
            seed=self.seed,
        )
