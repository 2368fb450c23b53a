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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from llmc_faq_slider.slider.head import JUDGED_ROWS, OutputHead, divergences
from llmc_faq_slider.slider.optimizer import linear_decay
from llmc_faq_slider.slider.stream import (
    DecoderCalls,
    epoch_batches,
    replaced_forwards,
    row_batches,
)
from llmc_faq_slider.slider.student import FoldedLinear, LinearGrids, QuantizedInputs

__all__ = ["ClosingResult", "ClosingSettings", "TunedLinear", "tune_scales"]


@dataclass(frozen=True)
class ClosingSettings:
    """
    :param epochs: passes over the calibration rows
    :param learning_rate: AdamW's first one for the factors on the scales; it decays
        linearly to zero
    """

    epochs: int
    learning_rate: float
    batch_size: int
    compute_dtype: torch.dtype
    seed: int


@dataclass
class ClosingResult:
    """Mean KL divergence per token from full precision, in nats."""

    start_loss: float
    loss: float

    @property
    def kept_start(self) -> bool:
        return not self.loss < self.start_loss


class TunedLinear:
    """
    A quantised linear whose codes stand and whose scales are free.

    :param module: the linear
    :param grids: its number formats
    :param folded: what its window learned
    """

    def __init__(self, module: nn.Module, grids: LinearGrids, folded: FoldedLinear):
        self.module = module
        self.grids = grids
        self.zero_point = folded.zero_point
        self.scale = folded.scale
        grid = grids.weight
        position = grid.grouped(folded.weight) / folded.scale.unsqueeze(-1)
        shift = 0 if self.zero_point is None else self.zero_point.unsqueeze(-1)
        codes = (position + shift).round_().clamp_(grid.q_min, grid.q_max) - shift
        # A code less its zero point has one bit more than the code.
        self.codes = codes.to(torch.int8 if grid.num_bits < 8 else torch.int16)
        self.factor = torch.ones_like(self.scale).requires_grad_()

    def tuned_scale(self) -> Tensor:
        """fp32 ``[out, groups]``, values that the checkpoint can hold."""
        return self.grids.weight.stored_scale(self.scale * self.factor)

    def weight(self) -> Tensor:
        """fp32 ``[out, in]``, on its grid."""
        return (self.codes.float() * self.tuned_scale().unsqueeze(-1)).flatten(-2)

    @torch.no_grad()
    def fold(self) -> FoldedLinear:
        scale = self.tuned_scale()
        return FoldedLinear(self.weight(), None, scale, self.zero_point)

    def forward(self, inputs: QuantizedInputs, dtype: torch.dtype) -> Any:
        bias = getattr(self.module, "bias", None)

        def forward(x: Tensor) -> Tensor:
            quantized = inputs(x, self.grids.input).to(dtype)
            weight = self.weight().to(dtype)
            shift = None if bias is None else bias.to(dtype)
            return F.linear(quantized, weight, shift).to(x.dtype)

        return forward


def tune_scales(
    calls: DecoderCalls,
    head: OutputHead,
    linears: Mapping[int, Mapping[str, TunedLinear]],
    hidden: list[Tensor],
    targets: list[Tensor],
    settings: ClosingSettings,
    device: torch.device,
) -> ClosingResult:
    """
    Tune the scales of all linears; the better of start and end stays in them.

    :param linears: quantised linears by layer index and name
    :param hidden: input of the first layer per row, ``[1, length, hidden]``
    :param targets: full-precision output of the last layer, likewise
    """
    tuned = [linear for layer in linears.values() for linear in layer.values()]
    factors = [linear.factor for linear in tuned]
    lengths = [row.shape[1] for row in hidden]
    batches = epoch_batches(
        lengths, settings.batch_size, settings.epochs, settings.seed
    )
    judged = list(
        row_batches(lengths, settings.batch_size, [*range(len(hidden))][:JUDGED_ROWS])
    )
    optimizer = torch.optim.AdamW(factors, settings.learning_rate, weight_decay=0.0)
    schedule = linear_decay(optimizer, len(batches))

    def loss_of(batch: list[int]) -> Tensor:
        state = torch.cat([hidden[i] for i in batch]).to(device)
        target = torch.cat([targets[i] for i in batch]).to(device)
        for index in range(len(calls.layers)):
            state = checkpoint(calls.run, index, state, use_reentrant=False)
        return divergences(head, state, target).mean()

    @torch.no_grad()
    def judge() -> float:
        return sum(loss_of(batch).item() for batch in judged) / len(judged)

    with ExitStack() as stack:
        for layer in linears.values():
            inputs = QuantizedInputs(1.0)
            forwards = {
                linear.module: linear.forward(inputs, settings.compute_dtype)
                for linear in layer.values()
            }
            stack.enter_context(replaced_forwards(forwards))
        start_loss = judge()
        with tqdm(total=len(batches), unit="step", desc="SliderQuant closing") as bar:
            for batch in batches:
                loss = loss_of(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                bar.set_postfix(kl=f"{loss.item():.3e}")
                bar.update()
        result = ClosingResult(start_loss, judge())
    if result.kept_start:
        with torch.no_grad():
            for factor in factors:
                factor.fill_(1.0)
    return result
