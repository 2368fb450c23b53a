"""A quantised linear in the closing pass: its codes stand, its scales are learned."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmc_faq_slider.slider.student import FoldedLinear, LinearGrids, QuantizedInputs

__all__ = ["TunedLinear"]


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

    def weight(self, scale: Tensor) -> Tensor:
        """fp32 ``[out, in]``, on the grid of ``scale``."""
        return (self.codes.float() * scale.unsqueeze(-1)).flatten(-2)

    @torch.no_grad()
    def fold(self) -> FoldedLinear:
        scale = self.tuned_scale()
        return FoldedLinear(self.weight(scale), None, scale, self.zero_point)

    def forward(self, inputs: QuantizedInputs, dtype: torch.dtype) -> Any:
        bias = getattr(self.module, "bias", None)

        def forward(x: Tensor) -> Tensor:
            quantized = inputs(x, self.grids.input).to(dtype)
            scale = self.tuned_scale()
            weight = self.grids.weight.multiplied(self.weight(scale), scale).to(dtype)
            shift = None if bias is None else bias.to(dtype)
            return F.linear(quantized, weight, shift).to(x.dtype)

        return forward
