"""How modules are called, and called with other forwards than their own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Arguments",
    "layer_output",
    "replaced_forwards",
    "same_arguments",
    "split_hidden",
]

#: positional and keyword arguments of a decoder layer beside its hidden states
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Hidden states of a decoder layer's call, and its other :data:`Arguments`."""
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def layer_output(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def same_arguments(before: Any, now: Any) -> bool:
    """Whether all tensors in two nested arguments are equal."""
    if isinstance(before, Tensor):
        return isinstance(now, Tensor) and torch.equal(before, now)
    if isinstance(before, Mapping):
        return before.keys() == now.keys() and all(
            same_arguments(value, now[key]) for key, value in before.items()
        )
    if isinstance(before, list | tuple):
        return len(before) == len(now) and all(map(same_arguments, before, now))
    return not isinstance(now, Tensor)


@contextmanager
def replaced_forwards(
    forwards: Mapping[nn.Module, Callable[..., Any]],
) -> Iterator[None]:
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, original in before.items():
            if original is None:
                del module.__dict__["forward"]
            else:
                module.forward = original
