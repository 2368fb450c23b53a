"""The learning loop: windows slide over the decoder, each is trained stage by stage.

Source: SliderQuant §3.2 (windows, intra-layer stages) and appendix B.2 (training).
For every window the target is the full-precision layers' output on the full-precision
path; the student sees the output of the quantised prefix, so it also corrects the error
made before it.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from loguru import logger
from torch import Tensor, nn
from tqdm import tqdm

from llmc_faq_slider.slider.head import JUDGED_ROWS, OutputHead, divergences
from llmc_faq_slider.slider.learnables import Kind
from llmc_faq_slider.slider.optimizer import SignDescent, linear_decay
from llmc_faq_slider.slider.stream import DecoderCalls, epoch_batches, row_batches
from llmc_faq_slider.slider.student import FoldedLayer, LinearGrids, StudentLayer
from llmc_faq_slider.slider.windows import Window

__all__ = ["LearningSettings", "WindowResult", "learn_windows", "stage_ratios"]

Commit = Callable[[int, FoldedLayer], None]


@dataclass(frozen=True)
class LearningSettings:
    """
    :param ratio: intra-layer ratio γ; ``1 / γ`` stages, 1.0 for a single one
    :param stage_order: all stages inside each window (the paper), or one sweep over all
        windows per stage (the released code)
    :param epochs: passes over the calibration rows per window, shared by its stages
    :param batch_size: rows per optimiser step
    :param low_rank: rank of the low-rank update, 0 for none
    :param rounding_travel: how far a rounding offset can travel in one window and
        stage, in steps of the weight grid; 0 learns no offsets
    :param channel_scales: learn channel scales where they fold; ``auto`` does so in
        layers with quantised inputs
    :param learning_rates: AdamW's first learning rate per kind of learnable; it decays
        linearly to zero within each window and stage
    :param compute_dtype: dtype of the student's matrix products
    :param seed: seeds low-rank starts and the order of rows
    """

    ratio: float
    stage_order: Literal["window", "sweep"]
    epochs: int
    batch_size: int
    low_rank: int
    rounding_travel: float
    channel_scales: bool | Literal["auto"]
    learning_rates: dict[Kind, float]
    compute_dtype: torch.dtype
    seed: int


@dataclass
class WindowResult:
    """What one window reached; losses are what it lowered: see :func:`_errors`."""

    window: Window
    start_loss: float
    loss: float
    seconds: float
    kept_start: bool = False


@dataclass
class _Decoder:
    """The model between the embedding and the head, and its two streams."""

    calls: DecoderCalls
    full_precision: list[Tensor]
    quantized: list[Tensor]
    device: torch.device
    head: OutputHead | None
    students: dict[int, StudentLayer] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        return [row.shape[1] for row in self.full_precision]

    def batch(self, rows: list[Tensor], indices: list[int]) -> Tensor:
        return torch.cat([rows[i] for i in indices]).to(self.device)


def stage_ratios(ratio: float) -> list[float]:
    """Intra-layer ratios ``γ, 2γ, ..., 1`` (§3.2)."""
    stages = max(1, round(1 / ratio))
    return [(stage + 1) / stages for stage in range(stages)]


def learn_windows(
    calls: DecoderCalls,
    hidden: list[Tensor],
    grids: dict[int, dict[str, LinearGrids]],
    windows: list[Window],
    settings: LearningSettings,
    device: torch.device,
    commit: Commit,
    head: OutputHead | None = None,
) -> tuple[list[WindowResult], list[Tensor]]:
    """
    Learn every window in order and hand each layer to ``commit`` after its last visit.

    :param calls: how to call the decoder layers
    :param hidden: input of the first layer per row, ``[1, length, hidden]``
    :param grids: number formats by layer index and name of linear; layers without an
        entry are passed through
    :param windows: training order from :func:`window_schedule`
    :param commit: writes the folded layer into the model; the layer must then compute
        with its quantised weights
    :param head: with it, windows that end at the last layer match the next-token
        distribution instead of the hidden states
    :return: one result per window, of its last stage, and the full-precision output of
        the last layer per row
    """
    decoder = _Decoder(calls, list(hidden), list(hidden), device, head)
    if settings.stage_order == "window":
        sweeps = [stage_ratios(settings.ratio)]
    else:
        sweeps = [[ratio] for ratio in stage_ratios(settings.ratio)]
    stages = sum(map(len, sweeps))
    epochs = [
        settings.epochs // stages + (k < settings.epochs % stages)
        for k in range(stages)
    ][::-1]
    steps_per_epoch = len(
        list(row_batches(decoder.lengths, settings.batch_size, [*range(len(hidden))]))
    )
    layer_steps = sum(map(len, windows)) * settings.epochs * steps_per_epoch

    results: list[WindowResult] = []
    with tqdm(total=layer_steps, unit="layer-step", desc="SliderQuant") as bar:
        for sweep, ratios in enumerate(sweeps):
            last_sweep = sweep == len(sweeps) - 1
            decoder.full_precision = list(hidden)
            decoder.quantized = list(hidden)
            for number, window in enumerate(windows):
                bar.set_description(f"window {number + 1}/{len(windows)} {window}")
                done_epochs = sweep if settings.stage_order == "sweep" else 0
                result = _learn_window(
                    decoder,
                    grids,
                    window,
                    dict(zip(ratios, epochs[done_epochs:], strict=False)),
                    settings,
                    bar,
                )
                if last_sweep:
                    results.append(result)
                following = (
                    windows[number + 1].start
                    if number + 1 < len(windows)
                    else window.stop
                )
                for index in range(window.start, following):
                    _advance(decoder, index, ratios[-1], settings.batch_size)
                    if last_sweep and index in decoder.students:
                        commit(index, decoder.students.pop(index).fold())
    return results, decoder.full_precision


def _learn_window(
    decoder: _Decoder,
    grids: dict[int, dict[str, LinearGrids]],
    window: Window,
    epochs: dict[float, int],
    settings: LearningSettings,
    bar: tqdm,
) -> WindowResult:
    """Train one window through its stages; keep the better of its start and end."""
    began = time.monotonic()
    targets = _targets(decoder, grids, window, settings)
    if not _window_students(decoder, window):
        return WindowResult(window, 0.0, 0.0, 0.0)
    final_ratio = max(epochs)
    start_loss = _window_loss(decoder, window, targets, final_ratio, settings)
    start = [student.state() for student in _window_students(decoder, window)]
    for ratio, count in epochs.items():
        _train_stage(decoder, window, targets, ratio, count, settings, bar)
    loss = _window_loss(decoder, window, targets, final_ratio, settings)
    # Negated so that a loss that is not a number keeps the start too.
    keep_start = not loss <= start_loss
    if keep_start:
        _restore(decoder, window, start)
        loss = start_loss
    seconds = time.monotonic() - began
    result = WindowResult(window, start_loss, loss, seconds, keep_start)
    logger.info(
        f"{window} ({window.family}): loss {result.start_loss:.4e} -> "
        f"{result.loss:.4e} in {result.seconds:.1f} s"
        + (", start kept" if result.kept_start else "")
    )
    return result


def _train_stage(
    decoder: _Decoder,
    window: Window,
    targets: list[Tensor],
    ratio: float,
    epochs: int,
    settings: LearningSettings,
    bar: tqdm,
) -> None:
    """
    Descent on the window's learnables (appendix B.2: no weight decay, linear decay).

    With rates that fall to zero the end is the best state there is but for noise.
    """
    students = _window_students(decoder, window)
    # Every window meets the rows in an order of its own.
    order_seed = settings.seed + 1000 * window.start + window.stop
    batches = epoch_batches(decoder.lengths, settings.batch_size, epochs, order_seed)
    optimizers = _optimizers(students, settings, len(batches))
    schedules = [linear_decay(optimizer, len(batches)) for optimizer in optimizers]
    per_epoch = len(batches) // max(1, epochs)
    epoch_loss = 0.0
    for step, batch in enumerate(batches):
        loss = _batch_loss(decoder, window, targets, batch, ratio, settings)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for schedule in schedules:
            schedule.step()
        epoch_loss += loss.item() / per_epoch
        bar.update(len(window))
        if (step + 1) % per_epoch == 0:
            bar.set_postfix(loss=f"{epoch_loss:.3e}", ratio=f"{ratio:.2f}")
            epoch_loss = 0.0


def _optimizers(
    students: list[StudentLayer], settings: LearningSettings, steps: int
) -> list[torch.optim.Optimizer]:
    """AdamW without weight decay, and sign descent for rounding offsets."""
    groups = []
    for kind, rate in settings.learning_rates.items():
        parameters = [p for student in students for p in student.parameters(kind)]
        if parameters:
            groups.append({"params": parameters, "lr": rate})
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, weight_decay=0.0))
    offsets = [p for student in students for p in student.parameters("rounding")]
    if offsets:
        # Rates that fall linearly to zero add up to half of the first one per step.
        rate = 2 * settings.rounding_travel / max(1, steps)
        optimizers.append(SignDescent(offsets, rate))
    return optimizers


def _batch_loss(
    decoder: _Decoder,
    window: Window,
    targets: list[Tensor],
    batch: list[int],
    ratio: float,
    settings: LearningSettings,
) -> Tensor:
    """Mean of :func:`_errors` over a batch of rows, with gradients."""
    hidden = decoder.batch(decoder.quantized, batch)
    with _installed(decoder, window, ratio, settings.compute_dtype):
        output = decoder.calls.run_span(window.layers, hidden)
        return _errors(decoder, window, output, decoder.batch(targets, batch)).mean()


def _errors(
    decoder: _Decoder, window: Window, output: Tensor, target: Tensor
) -> Tensor:
    """What a window lowers the mean of, per token ``[rows, length]``."""
    if decoder.head is None or window.stop < len(decoder.calls.layers):
        return token_errors(output, target)
    return divergences(decoder.head, output, target)


def token_errors(output: Tensor, target: Tensor) -> Tensor:
    """
    Squared error of each token's hidden state, relative to that state's square.

    Departure from eq. (1), which averages plain squared errors: the norm in front of
    every consumer removes a token's magnitude, and the few tokens with massive
    activations would otherwise be all that a deep window learns.

    :param output: ``[rows, length, hidden]``
    :return: fp32 ``[rows, length]``
    """
    target = target.float()
    error = (output.float() - target).square().mean(-1)
    return error / target.square().mean(-1).clamp(min=1e-12)


@torch.no_grad()
def _window_loss(
    decoder: _Decoder,
    window: Window,
    targets: list[Tensor],
    ratio: float,
    settings: LearningSettings,
) -> float:
    """Loss over up to :data:`JUDGED_ROWS` rows."""
    total = 0.0
    order = [*range(min(len(targets), JUDGED_ROWS))]
    with _installed(decoder, window, ratio, settings.compute_dtype):
        for batch in row_batches(decoder.lengths, settings.batch_size, order):
            hidden = decoder.batch(decoder.quantized, batch)
            output = decoder.calls.run_span(window.layers, hidden)
            errors = _errors(decoder, window, output, decoder.batch(targets, batch))
            total += errors.double().mean().item() * len(batch)
    return total / len(order)


@torch.no_grad()
def _targets(
    decoder: _Decoder,
    grids: dict[int, dict[str, LinearGrids]],
    window: Window,
    settings: LearningSettings,
) -> list[Tensor]:
    """
    Full-precision output of the window per row; starts students of new layers.

    The same pass measures how strongly each input channel of the new layers is excited.
    """
    new = [i for i in window.layers if i in grids and i not in decoder.students]
    sums: dict[tuple[int, str], Tensor] = {}
    handles = []
    for index in new:
        for name in grids[index]:
            module = decoder.calls.layers[index].get_submodule(name)
            handles.append(
                module.register_forward_pre_hook(_sum_squares(sums, (index, name)))
            )
    targets: list[Tensor] = [torch.empty(0)] * len(decoder.full_precision)
    order = [*range(len(targets))]
    for batch in row_batches(decoder.lengths, settings.batch_size, order):
        hidden = decoder.batch(decoder.full_precision, batch)
        output = decoder.calls.run_span(window.layers, hidden).cpu()
        for row, index in enumerate(batch):
            targets[index] = output[row : row + 1]
    for handle in handles:
        handle.remove()
    tokens = sum(decoder.lengths)
    for index in new:
        decoder.students[index] = StudentLayer(
            decoder.calls.layers[index],
            grids[index],
            {name: sums[index, name] / tokens for name in grids[index]},
            settings.low_rank,
            settings.rounding_travel > 0,
            quantizes_inputs(grids[index])
            if settings.channel_scales == "auto"
            else settings.channel_scales,
            torch.Generator().manual_seed(settings.seed + index),
        )
    return targets


def quantizes_inputs(grids: dict[str, LinearGrids]) -> bool:
    return any(grid.input is not None for grid in grids.values())


def _sum_squares(
    sums: dict[tuple[int, str], Tensor], key: tuple[int, str]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares = args[0].float().square().flatten(0, -2).sum(0)
        sums[key] = sums[key] + squares if key in sums else squares

    return hook


@torch.no_grad()
def _advance(decoder: _Decoder, index: int, ratio: float, batch_size: int) -> None:
    """Move both streams behind decoder layer ``index``, in the model's own dtype."""
    order = [*range(len(decoder.full_precision))]
    batches = list(row_batches(decoder.lengths, batch_size, order))
    for batch in batches:
        output = decoder.calls.run(index, decoder.batch(decoder.full_precision, batch))
        _put(decoder.full_precision, batch, output)
    layer = Window(index, index + 1, "fixed")
    with _installed(decoder, layer, ratio, decoder.quantized[0].dtype):
        for batch in batches:
            output = decoder.calls.run(index, decoder.batch(decoder.quantized, batch))
            _put(decoder.quantized, batch, output)


def _put(rows: list[Tensor], batch: list[int], output: Tensor) -> None:
    output = output.cpu()
    for row, index in enumerate(batch):
        rows[index] = output[row : row + 1]


def _window_students(decoder: _Decoder, window: Window) -> list[StudentLayer]:
    return [decoder.students[i] for i in window.layers if i in decoder.students]


def _restore(decoder: _Decoder, window: Window, state: list[list[Tensor]]) -> None:
    for student, saved in zip(_window_students(decoder, window), state, strict=True):
        student.restore(saved)


def _installed(
    decoder: _Decoder, window: Window, ratio: float, dtype: torch.dtype
) -> ExitStack:
    """Context in which the window's layers compute as students."""
    stack = ExitStack()
    for student in _window_students(decoder, window):
        stack.enter_context(student.installed(ratio, dtype))
    return stack
