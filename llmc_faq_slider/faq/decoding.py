"""Attention of one new token on a CPU, without copies of the keys.

torch's kernel for CPUs wants as many key heads as query heads, so grouped keys and
values are repeated at every step, and it is slow for a single query. Queries that share
a key head are one product with it here. What was attended to stays where it is: a cache
that is concatenated anew at every step costs as much as the model itself.
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["grouped_queries", "in_place"]

#: positions by which keys and values grow
_ROOM = 64

#: arguments of models whose attention is more than a softmax of scaled products
_MORE = ("position_bias", "s_aux", "softcap")


@contextmanager
def grouped_queries(device: torch.device) -> Iterator[None]:
    """Models that attend by ``sdpa`` do so by group of queries, on a CPU."""
    if device.type != "cpu":
        yield
        return
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """
    :param query: [rows, heads, tokens, head size]
    :param key: [rows, key heads, keys, head size]; ``value`` likewise
    :param attention_mask: bool or additive, broadcasts to [rows, heads, tokens, keys]
    :return: [rows, tokens, heads, value size], and no weights
    """
    rows, heads, tokens, size = query.shape
    shared = attention_mask is None or attention_mask.shape[1] == 1
    if tokens > 1 or not shared or any(kwargs.get(name) is not None for name in _MORE):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    grouped = query.reshape(rows, key.shape[1], -1, size)
    scores = (grouped @ key.transpose(-1, -2)).float()
    scores *= size**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, float("-inf"))
        else:
            scores = scores + attention_mask
    attended = scores.softmax(-1).to(value.dtype) @ value
    return attended.reshape(rows, 1, heads, -1), None


def in_place(cache: Cache, device: torch.device) -> None:
    """Let the layers of a cache that only grow do so in place, on a CPU."""
    if device.type == "cpu":
        cache.layers = [
            _Roomy(layer) if type(layer) is DynamicLayer else layer
            for layer in cache.layers
        ]


class _Roomy(DynamicLayer):
    """Keys and values are the first positions of larger tensors."""

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._shown: tuple[Tensor, ...] = ()
        self._buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        held, new = (self.keys, self.values), (key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        whole = len(self._shown) == 2 and all(map(operator.is_, held, self._shown))
        if not whole or end > self._buffers[0].shape[-2]:
            self._buffers = [
                x.new_empty(*x.shape[:-2], end + _ROOM, x.shape[-1]) for x in held
            ]
            for buffer, x in zip(self._buffers, held, strict=True):
                buffer[..., :start, :] = x
        for buffer, x in zip(self._buffers, new, strict=True):
            buffer[..., start:end, :] = x
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        self._shown = (self.keys, self.values)
        return self.keys, self.values
