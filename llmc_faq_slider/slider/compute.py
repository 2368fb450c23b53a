"""How a device computes: the same bits every time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["deterministic"]


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
