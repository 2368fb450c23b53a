"""In which dtype the student's matrix products are fastest."""

from typing import Literal

import torch

__all__ = ["ComputeDtype", "product_dtype"]

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
