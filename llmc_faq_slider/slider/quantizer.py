"""Uniform quantisation with gradients, on the grid that the checkpoint will store.

:class:`WeightGrid` and :class:`ActivationGrid` describe the deployed number format:
the signed integer range ``[-2^(b-1), 2^(b-1) - 1]`` or FP8 E4M3, zero inside every
asymmetric range, scales rounded to the stored dtype. They agree with
``compressed_tensors``' quantise and dequantise for every scheme.

Source: SliderQuant appendix B.1, eq. (A), moved to the signed grid of the
compressed-tensors format.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ActivationGrid", "WeightGrid", "quantized_columns"]

FP8_MAX = 448.0


def quantized_columns(ratio: float, in_features: int, group_size: int | None) -> int:
    """
    Leading input columns that are quantised at intra-layer ratio ``ratio``.

    The count is rounded up to whole groups. Departure: the released code cuts groups at
    ratios below 1 and then applies the scales of other rows to the remainder.

    :param ratio: share of the columns in (0, 1]
    """
    step = group_size or 1
    return min(in_features, math.ceil(ratio * in_features / step) * step)


class _QuantizeWeight(torch.autograd.Function):
    """
    ``(clamp(round(w / scale + offset + zero_point)) - zero_point) * scale``.

    Rounding passes the gradient unchanged, the clamp does so as far as values round to
    its ends, the scale gets the derivative of the rest, the zero point none. The
    offset's gradient has only the sign of its factor ``scale``: scaled descent divides
    its size out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        offset: Tensor | None,
        q_min: float,
        q_max: float,
    ) -> Tensor:
        """
        :param weight: fp32 ``[out, groups, columns]``
        :param scale: fp32 ``[out, groups, 1]``, not zero
        :param zero_point: fp32 whole numbers ``[out, groups, 1]``, None for zero
        :param offset: fp32 ``[out, groups, columns]`` in steps, None for zero
        """
        position = weight / scale
        shifted = position if zero_point is None else position + zero_point
        if offset is not None:
            shifted = shifted + offset
        code = shifted.clamp(q_min, q_max).round_()
        if zero_point is not None:
            code.sub_(zero_point)
        result = code * scale
        ctx.ends = q_min - 0.5, q_max + 0.5
        derivative = None
        if ctx.needs_input_grad[1]:
            derivative = code.sub_(_inside(position, shifted, ctx.ends))
        ctx.save_for_backward(shifted, derivative, scale.sign())
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        shifted, derivative, sign = ctx.saved_tensors
        scale_grad = None
        if derivative is not None:
            scale_grad = (grad * derivative).sum(dim=-1, keepdim=True)
        weight_grad = _inside(grad, shifted, ctx.ends)
        offset_grad = weight_grad * sign if ctx.needs_input_grad[3] else None
        return weight_grad, scale_grad, None, offset_grad, None, None


def _inside(values: Tensor, shifted: Tensor, ends: tuple[float, float]) -> Tensor:
    """``values`` where ``shifted`` lies between ``ends``, else 0, in a single pass."""
    result: Tensor = torch.ops.aten.hardtanh_backward(values, shifted, *ends)
    return result


class _QuantizeInput(torch.autograd.Function):
    """
    Dynamic quantisation per token, passing the gradient unchanged.

    The dynamic range covers every value, so nothing is clamped by more than half a
    step. Departure: the released code also differentiates the scale, which reaches
    only a token's largest value.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: "ActivationGrid", columns: int) -> Tensor:
        q_min, q_max = grid.q_min, grid.q_max
        if grid.symmetric:
            scale = x.abs().amax(-1, keepdim=True).float() / ((q_max - q_min) / 2)
            scale.clamp_(min=torch.finfo(torch.float32).smallest_normal)
            code = x[..., :columns].float().div(scale).clamp_(q_min, q_max)
        else:
            lower = x.amin(-1, keepdim=True).float().clamp_(max=0)
            upper = x.amax(-1, keepdim=True).float().clamp_(min=0)
            scale = (upper - lower) / (q_max - q_min)
            scale.clamp_(min=torch.finfo(torch.float32).smallest_normal)
            zero_point = (q_min - lower / scale).round_().clamp_(q_min, q_max)
            code = x[..., :columns].float().div(scale).add_(zero_point)
            code.clamp_(q_min, q_max)
        if grid.is_float:
            code = code.to(torch.float8_e4m3fn).float()
        else:
            code.round_()
        if not grid.symmetric:
            code.sub_(zero_point)
        quantized = code.mul_(scale).to(x.dtype)
        if columns == x.shape[-1]:
            return quantized
        return torch.cat([quantized, x[..., columns:]], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


def round_straight_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Value of ``x`` as ``dtype`` would store it, with the gradient of ``x``."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def _fp8_steps(scale: Tensor) -> tuple[Tensor, Tensor]:
    """
    Scales ``[out, groups]`` as vLLM's CUTLASS W4A8-FP8 loader splits them.

    :return: steps in E4M3, as fp32, and the unit of each output channel ``[out, 1]``
    """
    unit = scale.amax(-1, keepdim=True) / FP8_MAX
    # The loader keeps an eighth of each step; below 2^-3 that is subnormal.
    steps = (scale / unit).clamp(min=2.0**-3).to(torch.float8_e4m3fn).float()
    return steps, unit


@dataclass(frozen=True)
class WeightGrid:
    """
    Integer format of a weight matrix ``[out, in]``.

    :param num_bits: 2 to 8
    :param symmetric: without zero point
    :param group_size: input columns per scale, None for one scale per output channel
    :param scale_dtype: dtype in which the checkpoint stores the scales
    :param fp8_scales: restrict the group scales of an output channel to
        (their maximum / 448) x E4M3, the values that vLLM's CUTLASS W4A8-FP8 loader
        keeps, and let :meth:`multiplied` round weights as its kernel does
    """

    num_bits: int
    symmetric: bool
    group_size: int | None
    scale_dtype: torch.dtype
    fp8_scales: bool = False

    @property
    def q_min(self) -> float:
        return -(2.0 ** (self.num_bits - 1))

    @property
    def q_max(self) -> float:
        return 2.0 ** (self.num_bits - 1) - 1

    @property
    def scale_signs(self) -> tuple[float, ...]:
        """
        Signs that a scale may have. Both in symmetric groups of few bits, where the
        one code more below zero matters; only positive scales where a loader takes
        their logarithm or maximum (FP8) or scales belong to whole channels.
        """
        both = self.symmetric and self.group_size and not self.fp8_scales
        return (1.0, -1.0) if both and self.num_bits < 8 else (1.0,)

    def grouped(self, weight: Tensor) -> Tensor:
        """``[out, in]`` as ``[out, groups, columns per group]``."""
        return weight.unflatten(-1, (-1, self.group_size or weight.shape[-1]))

    def bounds(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """
        Lowest and highest value per group, zero included, without gradient.

        Departure: the released code differentiates them, which reaches one weight of
        a group and doubles the cost of a step.

        :return: two tensors ``[out, groups]``, the first <= 0, the second >= 0
        """
        groups = self.grouped(weight.detach())
        return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)

    def qparams(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        Scale (fp32 values that ``scale_dtype`` can hold) and zero point for bounds.

        :param lower: ``[out, groups]``, <= 0
        :param upper: ``[out, groups]``, >= 0
        :return: scale ``[out, groups]``, differentiable in the bounds, and the zero
            point as whole fp32 numbers, None when symmetric
        """
        half_range = (self.q_max - self.q_min) / 2
        if self.symmetric:
            scale = torch.maximum(-lower, upper) / half_range
        else:
            scale = (upper - lower) / (2 * half_range)
        scale = self.stored_scale(scale)
        if self.symmetric:
            return scale, None
        zero_point = (self.q_min - lower / scale).detach().round_()
        return scale, zero_point.clamp_(self.q_min, self.q_max)

    def stored_scale(self, scale: Tensor) -> Tensor:
        """
        Scale ``[out, groups]`` as the checkpoint will hold it, in fp32; the gradient
        passes unchanged.
        """
        # An all-zero group keeps codes of zero under any scale but zero.
        smallest = torch.finfo(self.scale_dtype).smallest_normal
        scale = torch.where(
            scale < 0, scale.clamp(max=-smallest), scale.clamp(min=smallest)
        )
        if not self.fp8_scales:
            return round_straight_through(scale, self.scale_dtype)
        steps, unit = _fp8_steps(scale.detach().to(self.scale_dtype).float())
        stored = (steps * unit).to(self.scale_dtype).float()
        return scale + (stored - scale).detach()

    def multiplied(self, weight: Tensor, scale: Tensor, ratio: float = 1.0) -> Tensor:
        """
        Quantised weight as the serving kernel multiplies it.

        Only vLLM's CUTLASS kernel for W4AFP8 changes it: instead of multiplying codes
        by scales it takes ``code * step / 8`` from a table of E4M3 numbers, which have
        four digits. The gradient passes unchanged.

        :param weight: ``[out, in]`` from :meth:`fake_quantize`
        :param scale: fp32 ``[out, groups]`` from :meth:`stored_scale`
        :param ratio: intra-layer ratio; columns behind it stay as they are
        """
        if not self.fp8_scales:
            return weight
        columns = quantized_columns(ratio, weight.shape[-1], self.group_size)
        head = self.grouped(weight.detach()[:, :columns])
        steps, unit = _fp8_steps(scale.detach())
        steps, scale = (x[:, : head.shape[1], None] for x in (steps, scale.detach()))
        entries = ((head / scale).round_() * (steps / 8)).to(torch.float8_e4m3fn)
        served = (entries.float() * (8 * unit.unsqueeze(-1))).flatten(-2)
        if columns < weight.shape[-1]:
            served = torch.cat([served, weight.detach()[:, columns:]], dim=1)
        return weight + (served - weight).detach()

    def fake_quantize(
        self,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        ratio: float = 1.0,
        offset: Tensor | None = None,
    ) -> Tensor:
        """
        Weight as the checkpoint will hold it, in its leading columns.

        :param weight: fp32 ``[out, in]``
        :param ratio: intra-layer ratio; columns behind it stay full precision
        :param offset: fp32 ``[out, in]``, added before rounding, in steps of the grid
        """
        columns = quantized_columns(ratio, weight.shape[-1], self.group_size)
        if columns < weight.shape[-1]:
            groups = columns // self.group_size if self.group_size else 1
            head = self.fake_quantize(
                weight[:, :columns],
                scale[:, :groups],
                None if zero_point is None else zero_point[:, :groups],
                offset=None if offset is None else offset[:, :columns],
            )
            return torch.cat([head, weight[:, columns:]], dim=1)
        quantized = _QuantizeWeight.apply(
            self.grouped(weight),
            scale.unsqueeze(-1),
            None if zero_point is None else zero_point.unsqueeze(-1),
            None if offset is None else self.grouped(offset),
            self.q_min,
            self.q_max,
        )
        return quantized.flatten(-2)


@dataclass(frozen=True)
class ActivationGrid:
    """
    Dynamic per-token format of a linear's input ``[..., in]``.

    :param num_bits: 4 or 8 for integers, 8 for FP8 E4M3
    :param symmetric: without zero point; FP8 is always symmetric
    :param is_float: FP8 E4M3 instead of integers
    """

    num_bits: int
    symmetric: bool = True
    is_float: bool = False

    @property
    def q_min(self) -> float:
        return -FP8_MAX if self.is_float else -(2.0 ** (self.num_bits - 1))

    @property
    def q_max(self) -> float:
        return FP8_MAX if self.is_float else 2.0 ** (self.num_bits - 1) - 1

    def fake_quantize(self, x: Tensor, ratio: float = 1.0) -> Tensor:
        """
        :param x: ``[..., in]`` of any float dtype; computed in fp32, returned as given
        :param ratio: share of the leading channels that are quantised; the scale
            always comes from the whole token
        """
        columns = quantized_columns(ratio, x.shape[-1], None)
        return _QuantizeInput.apply(x, self, columns)
