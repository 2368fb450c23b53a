"""The closing pass: all scales of the quantised model, tuned together on its output.

Windows end at their own last layer, so what they leave over adds up behind them. When
all codes are decided, one scale per group is still free; tuning these against the
full-precision next-token distribution takes back part of the loss and cannot overfit
by much, since a group of weights has one number.

Departure: the paper ends with the last window. EfficientQAT (arXiv 2407.11062, its
second phase) does the same with the training loss on text.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite, nan

import torch
from loguru import logger
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from llmc_faq_slider.slider.checkpoint import Checkpoint
from llmc_faq_slider.slider.closing_state import (
    restore_steps,
    save_steps,
    saved_attempt,
    say_stopped,
)
from llmc_faq_slider.slider.head import OutputHead, divergences
from llmc_faq_slider.slider.interruption import StopRequest
from llmc_faq_slider.slider.loss import CountedTokens
from llmc_faq_slider.slider.memory import RowLimit
from llmc_faq_slider.slider.optimizer import linear_decay
from llmc_faq_slider.slider.row_losses import accumulate_gradients, judge
from llmc_faq_slider.slider.stream import (
    DecoderCalls,
    epoch_batches,
    replaced_forwards,
)
from llmc_faq_slider.slider.student import QuantizedInputs
from llmc_faq_slider.slider.tuned_linear import TunedLinear

__all__ = ["ClosingResult", "ClosingSettings", "tune_scales"]

RETRIES = 2
RETRY_RATE = 0.1
# An end is put back when its loss is this many times the start's. Windows fit the rows
# that judge both, so that an end above its start may still be better on other text.
TOLERATED_RISE = 2.0


@dataclass(frozen=True)
class ClosingSettings:
    """
    :param epochs: passes over the calibration rows
    :param learning_rate: AdamW's first one for the factors on the scales, in steps that
        it moves a linear's largest code; it decays linearly to zero
    """

    epochs: int
    learning_rate: float
    batch_size: int
    compute_dtype: torch.dtype
    seed: int

    @property
    def plan(self) -> dict[str, float]:
        """What a saved state must agree with, beside what windows must."""
        return {"epochs": self.epochs, "learning_rate": self.learning_rate}


@dataclass
class ClosingResult:
    """
    Mean KL divergence per token from full precision, in nats.

    :param kept_start: its end was far worse, so the start was kept
    :param retries: times it began anew at a lower rate after a loss that was not finite
    """

    start_loss: float
    loss: float
    kept_start: bool = False
    retries: int = 0


class _ScaleTuning:
    """The pass on its way through steps, and attempts at lower rates."""

    def __init__(
        self,
        calls: DecoderCalls,
        head: OutputHead,
        linears: list[TunedLinear],
        hidden: list[Tensor],
        targets: list[Tensor],
        settings: ClosingSettings,
        device: torch.device,
        tokens: CountedTokens,
        limit: RowLimit,
    ):
        self.calls = calls
        self.head = head
        self.linears = linears
        self.factors = [linear.factor for linear in linears]
        self.hidden = hidden
        self.targets = targets
        self.settings = settings
        self.device = device
        self.tokens = tokens
        self.limit = limit

    def descend(
        self, attempt: int, saved: Checkpoint | None, stop: StopRequest | None
    ) -> bool:
        """All steps that are left of an attempt; whether every loss was finite."""
        size, epochs = self.settings.batch_size, self.settings.epochs
        batches = epoch_batches(self.tokens.lengths, size, epochs, self.settings.seed)
        rate = self.settings.learning_rate * RETRY_RATE**attempt
        groups = [
            {"params": [linear.factor], "lr": rate / -linear.grids.weight.q_min}
            for linear in self.linears
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = linear_decay(optimizer, len(batches))
        half = self.hidden[0].dtype == torch.float16
        scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        plan = self.settings.plan
        done = restore_steps(
            saved, plan, attempt, self.factors, optimizer, schedule, scaler
        )
        with tqdm(total=len(batches), unit="step", desc="SliderQuant closing") as bar:
            bar.update(done)
            for number, rows in enumerate(batches[done:], start=done + 1):
                loss = self._step(rows, optimizer, scaler)
                if not isfinite(loss):
                    return False
                schedule.step()
                bar.set_postfix(kl=f"{loss:.3e}")
                bar.update()
                stopping = stop is not None and stop.requested
                epoch_ends = number % (len(batches) // epochs) == 0
                if saved is not None and (stopping or epoch_ends):
                    save_steps(
                        saved, plan, attempt, number, self.factors, optimizer, scaler
                    )
                if stop is not None and stopping:
                    say_stopped(stop, saved, number, len(batches))
                    raise stop.exit()
        return True

    def _step(
        self,
        rows: list[int],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> float:
        """One optimiser step on the mean divergence of a batch's tokens that count."""
        if not self.tokens.count(rows):
            # Without gradients it changes nothing, but the schedule waits for it.
            optimizer.step()
            return 0.0
        clear = optimizer.zero_grad
        loss = accumulate_gradients(
            self._divergence, rows, self.tokens, self.limit, scaler, clear
        )
        if isfinite(loss):
            scaler.step(optimizer)
            scaler.update()
        clear()
        return loss

    def _divergence(self, rows: list[int]) -> Tensor:
        """Of rows of one length, mean over their tokens that count."""
        state = torch.cat([self.hidden[i] for i in rows]).to(self.device)
        target = torch.cat([self.targets[i] for i in rows]).to(self.device)
        mask = self.tokens.mask(rows, self.device)
        for index in range(len(self.calls.layers)):
            state = checkpoint(self.calls.run, index, state, use_reentrant=False)
        return divergences(self.head, state, target, mask).mean()

    def judge(self) -> float:
        return judge(self._divergence, self.tokens, self.limit)

    @torch.no_grad()
    def reset(self) -> None:
        for factor in self.factors:
            factor.fill_(1.0)


def tune_scales(
    calls: DecoderCalls,
    head: OutputHead,
    linears: Mapping[int, Mapping[str, TunedLinear]],
    hidden: list[Tensor],
    targets: list[Tensor],
    settings: ClosingSettings,
    device: torch.device,
    tokens: CountedTokens | None = None,
    limit: RowLimit | None = None,
    saved: Checkpoint | None = None,
    stop: StopRequest | None = None,
) -> ClosingResult:
    """
    Tune the scales of all linears; an end that is far worse than the start is put back.

    A loss that is not finite puts the start back, and the pass begins anew at a tenth
    of the rate, twice at most.

    :param linears: quantised linears by layer index and name
    :param hidden: input of the first layer per row, ``[1, length, hidden]``
    :param targets: full-precision output of the last layer, likewise
    :param tokens: whose divergences count, None for all
    :param limit: rows per forward pass, None for ``batch_size``
    :param saved: goes on from its newest state, and saves one after every epoch
    :param stop: once set, the pass stops after the step at hand, with a state saved
    """
    tuning = _ScaleTuning(
        calls,
        head,
        [linear for layer in linears.values() for linear in layer.values()],
        hidden,
        targets,
        settings,
        device,
        tokens or CountedTokens.all([row.shape[1] for row in hidden]),
        limit or RowLimit(settings.batch_size),
    )
    with ExitStack() as stack:
        for layer in linears.values():
            inputs = QuantizedInputs(1.0)
            forwards = {
                linear.module: linear.forward(inputs, settings.compute_dtype)
                for linear in layer.values()
            }
            stack.enter_context(replaced_forwards(forwards))
        start_loss = tuning.judge()
        for attempt in range(saved_attempt(saved, settings.plan), RETRIES + 1):
            finite = tuning.descend(attempt, saved, stop)
            loss = tuning.judge() if finite else nan
            if isfinite(loss):
                break
            tuning.reset()
            logger.warning(
                f"closing pass, attempt {attempt + 1}: the loss is not finite"
            )
    # Negated so that a loss that is not a number keeps the start too.
    kept_start = not loss <= TOLERATED_RISE * start_loss
    if kept_start:
        tuning.reset()
        loss = start_loss
    result = ClosingResult(start_loss, loss, kept_start, attempt)
    logger.info(
        f"closing pass: divergence {result.start_loss:.4e} -> {result.loss:.4e}"
        + (", start kept" if result.kept_start else "")
    )
    return result
