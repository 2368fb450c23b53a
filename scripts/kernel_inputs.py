"""Which kernel of vLLM took a linear, and which precision it gave the inputs.

Needs torch alone: scripts use it in the serving environment, benchmarks outside of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kernel_of(scheme: Any) -> str | None:
    """Class of the kernel that a scheme of compressed-tensors chose."""
    fields = vars(scheme) if scheme is not None else {}
    for name in ("kernel", "fp8_linear", "linear_kernel"):
        if fields.get(name) is not None:
            return type(fields[name]).__name__
    return None


def random_inputs(size: int, generator: torch.Generator) -> Tensor:
    """Inputs ``[16, size]`` bf16 that tell precisions apart."""
    x = torch.randn(16, size, generator=generator)
    # Outliers of one sign: 8 bits with and without a zero point differ visibly.
    x[:, 3], x[2:, 7] = 60.0, 40.0
    return x.to(torch.bfloat16)


def input_errors(weight: Tensor, inputs: Tensor, output: Tensor) -> dict[str, float]:
    """Relative error of a kernel's output against each precision of the inputs.

    :param weight: fp32 ``[outputs, inputs]`` as the kernel multiplies it
    """
    errors = {}
    for name, rounded in _rounded(inputs.float()).items():
        exact = rounded @ weight.T
        errors[name] = ((output.float() - exact).norm() / exact.norm()).item()
    return errors


def _rounded(x: Tensor) -> dict[str, Tensor]:
    """``x`` [tokens, inputs] in each precision that a kernel may give it."""
    peak = x.abs().amax(-1, keepdim=True)

    def symmetric(bits: int) -> Tensor:
        step = peak / (2 ** (bits - 1) - 1)
        return (x / step).round() * step

    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / 255
    zero_point = (-low / step).round()
    codes = ((x / step).round() + zero_point).clamp(0, 255)
    fp8_step = peak / 448
    return {
        "16 bit": x,
        "int8 per token": symmetric(8),
        "int8 per token with zero point": (codes - zero_point) * step,
        "int4 per token": symmetric(4),
        "FP8 per token": (x / fp8_step).to(torch.float8_e4m3fn).float() * fp8_step,
    }
