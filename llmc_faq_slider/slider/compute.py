"""How a device computes: the fastest dtype, and the same bits every time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

__all__ = ["ComputeDtype", "deterministic", "product_dtype"]

ComputeDtype = Literal["auto", "bfloat16", "float32"]


def product_dtype(choice: ComputeDtype, device: torch.device) -> torch.dtype:
    """
    dtype of matrix products on a device.

    Without AMX the CPUs measured in docs/experiments.md multiply bf16 slower than fp32,
    so that ``auto`` is float32 there and bfloat16 elsewhere.
    """
    if choice != "auto":
        return getattr(torch, choice)
    if device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        return torch.float32
    return torch.bfloat16


@contextmanager
def deterministic() -> Iterator[None]:
    """
    Context in which the same inputs give the same bits on a GPU, as they do on a CPU.

    Without it, the backward pass of fused attention adds up blocks in any order. An
    operation that has no deterministic form raises a RuntimeError that says so.
    """
    if not torch.cuda.is_initialized():
        yield
        return
    # PyTorch insists on it; it is read at every matrix product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    mode = torch.get_deterministic_debug_mode()
    filled = memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    # Filling new memory costs time and changes no result.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = filled
