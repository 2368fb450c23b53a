"""In which dtype a device multiplies: the faster one, in every product that is made."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ComputeDtype", "multiplied_in", "product_dtype"]

ComputeDtype = Literal["auto", "bfloat16", "float32"]

_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
# What every product comes down to, forward and backward.
_PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::_addmm_activation",
    "aten::bmm",
    "aten::baddbmm",
    "aten::addbmm",
    "aten::mv",
    "aten::addmv",
    "aten::dot",
    "aten::vdot",
    "aten::addr",
    "aten::_trilinear",
    "aten::_grouped_mm",
    "transformers::grouped_mm_fallback",
    "aten::convolution",
    "aten::convolution_backward",
    _ATTENTION,
    f"{_ATTENTION}_backward",
}


def product_dtype(choice: ComputeDtype, device: torch.device) -> torch.dtype:
    """
    dtype of matrix products on a device.

    ``auto`` is bfloat16 on accelerators, on CPUs with AMX and on AMD's with AVX-512's
    bf16 instructions. The other CPUs measured in docs/experiments.md multiply bf16
    slower than float32, which it is there.
    """
    if choice != "auto":
        return getattr(torch, choice)
    if device.type != "cpu":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    # Intel's bf16 instructions without AMX were slower than float32.
    fast = able.get("avx512_bf16") and str(able.get("cpu_name", "")).startswith("AMD")
    used = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if able.get("amx_bf16") or (fast and used):
        return torch.bfloat16
    return torch.float32


def multiplied_in(
    dtype: torch.dtype, device: torch.device
) -> AbstractContextManager[Any]:
    """
    Context in which a CPU makes every product in float32, where that is ``dtype``.

    Factors of 16 bits are widened for the product alone, and its result is rounded to
    what it would have been in, so that a model keeps its dtype between products. What
    is wider already stays so, and accelerators are left alone.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return nullcontext()
    return _InFloat32()


class _InFloat32(TorchDispatchMode):
    """Below autograd, so that gradients and recomputed layers are products like all."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            # Without autograd above it, even what consists of others comes down here.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if not _is_product(func) or "out" in kwargs:
            return func(*args, **kwargs)
        narrow = next((x.dtype for x in args if _is_narrow(x)), None)
        if narrow is None:
            return func(*args, **kwargs)
        result = func(
            *(_widened(x) for x in args), **{k: _widened(x) for k, x in kwargs.items()}
        )
        if isinstance(result, Tensor):
            return result.to(narrow)
        if func._schema.name == _ATTENTION:
            # The logarithms of its sums are float32 in any case.
            return result[0].to(narrow), result[1]
        return tuple(x if x is None else x.to(narrow) for x in result)


@cache
def _is_product(func: Any) -> bool:
    return func._schema.name in _PRODUCTS


def _is_narrow(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)


def _widened(x: Any) -> Any:
    return x.float() if _is_narrow(x) else x
