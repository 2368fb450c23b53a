"""Gradients for a stage that learns, whatever its caller has switched off.

Private upstream API: none. ``disable_onloading``, which shows and exchanges weights
where they are stored, is a public function of compressed-tensors.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from compressed_tensors.offload import disable_onloading
from torch import Tensor, nn

__all__ = ["learnable_weights", "with_gradients"]

T = TypeVar("T")


def with_gradients(work: Callable[..., T]) -> Callable[..., T]:
    """``work``, for which neither ``no_grad`` nor ``inference_mode`` is in force."""

    @wraps(work)
    def run(*args: Any, **kwargs: Any) -> T:
        with torch.inference_mode(False), torch.enable_grad():
            return work(*args, **kwargs)

    return run


def learnable_weights(model: nn.Module) -> None:
    """
    Exchange tensors that were made in inference mode, which can never be part of a
    graph, for copies of them. Those that are one tensor stay one.
    """
    copies: dict[Tensor, Tensor] = {}
    with disable_onloading():
        for module in model.modules():
            stored: Any
            for stored in (module._parameters, module._buffers):
                for name, tensor in stored.items():
                    if tensor is None or not tensor.is_inference():
                        continue
                    if tensor.device.type == "meta":
                        continue
                    if tensor not in copies:
                        copies[tensor] = _copy(tensor)
                    stored[name] = copies[tensor]


def _copy(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    return tensor.clone()
