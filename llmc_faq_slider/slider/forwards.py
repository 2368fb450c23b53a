"""How modules are called, and called with other forwards than their own."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Arguments",
    "fresh",
    "layer_output",
    "replaced_forwards",
    "same_arguments",
    "same_output",
    "shadowed_weight",
    "split_hidden",
]

# Squared error relative to the square, far above rounding.
SAME_OUTPUT = 1e-2
FEW_ROUNDINGS = 8

#: positional and keyword arguments of a decoder layer beside its hidden states
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Hidden states of a decoder layer's call, and its other :data:`Arguments`."""
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def fresh(arguments: Arguments) -> Arguments:
    """The same with mappings of their own, in which what layers leave is lost."""

    def own(value: Any) -> Any:
        return copy(value) if isinstance(value, MutableMapping) else value

    args, kwargs = arguments
    return tuple(map(own, args)), {name: own(value) for name, value in kwargs.items()}


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


def same_output(one: Tensor, other: Tensor, exactly: bool = False) -> bool:
    """
    Whether two outputs are of one computation.

    :param exactly: they may differ by a few roundings of their dtype, not by those of
        many products
    """
    other = other.float()
    error = one.float() - other
    if exactly:
        eps = torch.finfo(one.dtype).eps
        return bool(error.abs().max() <= FEW_ROUNDINGS * eps * other.abs().max())
    return bool(error.square().sum() <= SAME_OUTPUT * other.square().sum())


@contextmanager
def shadowed_weight(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """Have a module compute with another weight; its parameter stays as it is."""
    module.__dict__["weight"] = weight
    try:
        yield
    finally:
        del module.__dict__["weight"]


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
