"""Training of one window.

Source: SliderQuant §3.2 (intra-layer stages) and appendix B.2 (training). The student
sees the output of the quantised prefix, so it also corrects the error made before it.
"""

import math
import time
from collections.abc import Mapping

import torch
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from llmc_faq_slider.slider.decoder import Decoder
from llmc_faq_slider.slider.interruption import StopRequest
from llmc_faq_slider.slider.learning_state import (
    LearningSettings,
    Stopped,
    Unfinished,
    WindowResult,
)
from llmc_faq_slider.slider.loss import output_loss
from llmc_faq_slider.slider.optimizer import (
    linear_decay,
    optimizer_tensors,
    restore_optimizer,
    student_optimizers,
)
from llmc_faq_slider.slider.row_losses import accumulate_gradients, judge
from llmc_faq_slider.slider.stream import epoch_batches
from llmc_faq_slider.slider.windows import Window

__all__ = ["learn_window"]

RETRIES = 2
RETRY_RATE = 0.1


class _NotFinite(Exception):
    """A loss is NaN or infinite."""


class _Training:
    """One window on its way through stages, steps, and attempts at lower rates."""

    def __init__(
        self,
        decoder: Decoder,
        window: Window,
        visits: Mapping[int, int],
        epochs: Mapping[float, int],
        settings: LearningSettings,
        bar: tqdm,
        stop: StopRequest,
    ):
        self.decoder = decoder
        self.window = window
        self.students = decoder.window_students(window)
        self.shares = [
            visits[layer] ** -settings.visit_decay
            for layer in window.layers
            if layer in decoder.students
        ]
        self.epochs = epochs
        self.settings = settings
        self.bar = bar
        self.stop = stop
        self.began = time.monotonic()

    def run(self, attempt: int, unfinished: Unfinished | None) -> None:
        """
        All stages, or those that are left.

        :raises _NotFinite: if a loss is not
        :raises Stopped: if asked to
        """
        for stage, (ratio, epochs) in enumerate(self.epochs.items()):
            if unfinished is None or stage > unfinished.stage:
                self._stage(attempt, stage, ratio, epochs, None)
            elif stage == unfinished.stage:
                self._stage(attempt, stage, ratio, epochs, unfinished)
            else:
                self.bar.update(len(self._batches(epochs)) * len(self.window))

    def _batches(self, epochs: int) -> list[list[int]]:
        # Every window meets the rows in an order of its own.
        seed = self.settings.seed + 1000 * self.window.start + self.window.stop
        size = self.settings.batch_size
        return epoch_batches(self.decoder.lengths, size, epochs, seed)

    def _stage(
        self,
        attempt: int,
        stage: int,
        ratio: float,
        epochs: int,
        unfinished: Unfinished | None,
    ) -> None:
        """
        Descent on the window's learnables (appendix B.2: no weight decay, linear
        decay). With rates that fall to zero the end is the best state but for noise.
        """
        batches = self._batches(epochs)
        shares = [share * RETRY_RATE**attempt for share in self.shares]
        optimizers = student_optimizers(
            list(zip(self.students, shares, strict=True)), self.settings, len(batches)
        )
        schedules = [linear_decay(optimizer, len(batches)) for optimizer in optimizers]
        # Gradients of fp16 hidden states would vanish; elsewhere it does nothing.
        half = self.decoder.quantized[0].dtype == torch.float16
        scaler = torch.amp.GradScaler(self.decoder.device.type, enabled=half)
        done = 0
        if unfinished is not None:
            done = unfinished.step
            self._restore(unfinished, optimizers, schedules, scaler)
            self.bar.update(done * len(self.window))
        per_epoch = len(batches) // max(1, epochs)
        epoch_loss = 0.0
        for step, batch in enumerate(batches[done:], start=done + 1):
            loss = self._step(batch, ratio, optimizers, scaler)
            for schedule in schedules:
                schedule.step()
            epoch_loss += loss / per_epoch
            self.bar.update(len(self.window))
            if step % per_epoch == 0:
                self.bar.set_postfix(loss=f"{epoch_loss:.3e}", ratio=f"{ratio:.2f}")
                epoch_loss = 0.0
            if self.stop.requested:
                raise Stopped(
                    self._unfinished(attempt, stage, step, optimizers, scaler)
                )

    def _step(
        self,
        batch: list[int],
        ratio: float,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
    ) -> float:
        """One optimiser step on the mean loss of a batch's tokens that count."""

        def clear() -> None:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)

        tokens = self.decoder.tokens
        if not tokens.count(batch):
            # Without gradients it changes nothing, but schedules wait for it.
            for optimizer in optimizers:
                optimizer.step()
            return 0.0
        loss = accumulate_gradients(
            lambda rows: self._row_loss(rows, ratio),
            batch,
            tokens,
            self.decoder.limit,
            scaler,
            clear,
        )
        if not math.isfinite(loss):
            clear()
            raise _NotFinite
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        clear()
        return loss

    def _row_loss(self, rows: list[int], ratio: float) -> Tensor:
        """Mean over the tokens that count in rows of one length."""
        decoder, window = self.decoder, self.window
        hidden = decoder.batch(decoder.quantized, rows)
        target = decoder.batch(decoder.full_precision, rows)
        mask = decoder.tokens.mask(rows, decoder.device)
        with decoder.installed(window, ratio, self.settings.compute_dtype):
            output = decoder.calls.run_span(window.layers, hidden)
            return output_loss(output, target, mask)

    def judge(self, ratio: float) -> float:
        decoder = self.decoder
        return judge(
            lambda rows: self._row_loss(rows, ratio), decoder.tokens, decoder.limit
        )

    def _unfinished(
        self,
        attempt: int,
        stage: int,
        step: int,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
    ) -> Unfinished:
        tensors = {
            f"learned.{number}.{place:06d}": tensor
            for number, student in enumerate(self.students)
            for place, tensor in enumerate(student.state())
        }
        for number, optimizer in enumerate(optimizers):
            for name, tensor in optimizer_tensors(optimizer).items():
                tensors[f"optimizer.{number}.{name}"] = tensor
        seconds = time.monotonic() - self.began
        return Unfinished(attempt, stage, step, seconds, scaler.state_dict(), tensors)

    def _restore(
        self,
        unfinished: Unfinished,
        optimizers: list[torch.optim.Optimizer],
        schedules: list[torch.optim.lr_scheduler.LambdaLR],
        scaler: torch.amp.GradScaler,
    ) -> None:
        for number, student in enumerate(self.students):
            student.restore(list(_under(f"learned.{number}.", unfinished).values()))
        pairs = zip(optimizers, schedules, strict=True)
        for number, (optimizer, schedule) in enumerate(pairs):
            tensors = _under(f"optimizer.{number}.", unfinished)
            restore_optimizer(optimizer, schedule, tensors, unfinished.step)
        scaler.load_state_dict(unfinished.scaler)
        self.began -= unfinished.seconds


def _under(prefix: str, unfinished: Unfinished) -> dict[str, Tensor]:
    """Tensors whose names start with ``prefix``, without it, in order."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in sorted(unfinished.tensors.items())
        if name.startswith(prefix)
    }


def learn_window(
    decoder: Decoder,
    window: Window,
    visits: Mapping[int, int],
    epochs: Mapping[float, int],
    settings: LearningSettings,
    bar: tqdm,
    stop: StopRequest,
    unfinished: Unfinished | None = None,
) -> WindowResult:
    """
    Train one window through its stages; keep the better of its start and end.

    A loss that is not finite puts the start back, and the window begins anew at a tenth
    of the rates, twice at most.

    :param visits: which visit this is to each of the window's layers, from 1 on
    :param epochs: passes over the rows by intra-layer ratio, in order
    :param unfinished: where an earlier run was stopped inside this window
    :raises Stopped: between two steps, when ``stop`` is set
    """
    students = decoder.window_students(window)
    if not students:
        return WindowResult(window, 0.0, 0.0, 0.0)
    training = _Training(decoder, window, visits, epochs, settings, bar, stop)
    final_ratio = max(epochs)
    start_loss = training.judge(final_ratio)
    start = [student.state() for student in students]

    def restore() -> None:
        for student, saved in zip(students, start, strict=True):
            student.restore(saved)

    attempt = 0 if unfinished is None else unfinished.attempt
    shown = bar.n
    while True:
        try:
            training.run(attempt, unfinished)
            loss = training.judge(final_ratio)
        except _NotFinite:
            loss = math.nan
        if math.isfinite(loss) or attempt == RETRIES:
            break
        restore()
        attempt, unfinished, bar.n = attempt + 1, None, shown
        logger.warning(
            f"{window}: the loss is not finite. The window begins anew with "
            f"{RETRY_RATE**attempt:g} of the learning rates."
        )
    # Negated so that a loss that is not a number keeps the start too.
    keep_start = not loss <= start_loss and not (
        math.isfinite(loss) and not math.isfinite(start_loss)
    )
    if keep_start:
        restore()
        loss = start_loss
    seconds = time.monotonic() - training.began
    result = WindowResult(window, start_loss, loss, seconds, keep_start, attempt)
    logger.info(
        f"{window} ({window.family}): loss {result.start_loss:.4e} -> "
        f"{result.loss:.4e} in {result.seconds:.1f} s"
        + (", start kept" if result.kept_start else "")
    )
    return result
