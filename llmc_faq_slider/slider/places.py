"""Where channel scales may fold in a decoder layer (SliderQuant §3.3, eq. 2).

The paper's places are norm → q, k, v; norm → gate, up; v → o; up → down. The readers of
a norm are those that are seen to read it, whatever they are called, experts and linears
that stay unquantised among them. What is between two linears is not seen, so those are
proposed by name, and :mod:`folds` finds by computation what is exact. The released
code's place between q and k is left out: it is not exact under rotary embeddings and
wrong when norms sit on q and k.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Place", "fold_places", "norm_offset", "norm_readers", "stored_weight"]

# Producer, consumer: of one expert, MLP or attention each.
LINEAR_PLACES = (
    ("up_proj", "down_proj"),
    ("w3", "w2"),
    ("v_proj", "o_proj"),
    ("v_proj", "out_proj"),
    ("v_proj", "dense"),
)
# The same with the producer's rows behind or among those of others.
FUSED_UP = (("gate_up_proj", "down_proj"),)
FUSED_VALUES = (
    ("qkv_proj", "o_proj"),
    ("query_key_value", "dense"),
    ("Wqkv", "out_proj"),
)
_EXPERT_INPUTS = (".gate_proj", ".up_proj", ".w1", ".w3")


@dataclass(frozen=True)
class Place:
    """
    One set of scales: it divides what ``source`` puts out, and multiplies the input
    columns of ``consumers``. Names are relative to the decoder layer.

    :param head_dim: channels per head where query heads share value heads
    :param rows: output channels of a linear source, None for all
    """

    source: str
    consumers: tuple[str, ...]
    source_is_norm: bool
    head_dim: int | None = None
    rows: tuple[range, ...] | None = None

    def channels(self, outputs: int) -> list[int]:
        """Indices of the source's output channels that are scaled."""
        ranges = (range(outputs),) if self.rows is None else self.rows
        return [index for rows in ranges for index in rows]

    @property
    def kind(self) -> tuple[str, tuple[str, ...]]:
        """The same for the same place of all experts."""
        consumers = dict.fromkeys(map(_any_expert, self.consumers))
        return _any_expert(self.source), tuple(consumers)


def fold_places(
    layer: nn.Module, linears: set[str], readers: dict[str, list[str]]
) -> list[list[Place]]:
    """
    Places of a decoder layer, each with the ways in which it may be laid out.

    Linears are those that this stage quantises; a place has at least one for consumer.
    One that another stage quantises is left as it is.

    :param readers: of each norm, from :func:`norm_readers`
    """
    found = []
    for norm, names in readers.items():
        if linears.isdisjoint(names):
            continue
        size = len(stored_weight(layer.get_submodule(norm)))
        others = [layer.get_submodule(n) for n in names if n not in linears]
        if all(_is_foldable(module, size) for module in others):
            found.append([Place(norm, tuple(names), source_is_norm=True)])
    for name in sorted(linears):
        ways = list(_behind(layer, name, linears))
        if ways:
            found.append(ways)
    return found


def _behind(layer: nn.Module, name: str, linears: set[str]) -> Iterator[Place]:
    """Places between a linear and the one that follows it, by their names."""
    parent, _, last = name.rpartition(".")
    holder = layer.get_submodule(parent)
    outputs = stored_weight(layer.get_submodule(name)).shape[0]
    head_dim = getattr(holder, "head_dim", getattr(holder, "head_size", None))
    for producer, consumer in (*LINEAR_PLACES, *FUSED_UP, *FUSED_VALUES):
        follower = f"{parent}.{consumer}" if parent else consumer
        if last != producer or follower not in linears:
            continue
        inputs = stored_weight(layer.get_submodule(follower)).shape[1]
        if (producer, consumer) in FUSED_UP:
            yield Place(
                name, (follower,), False, rows=(range(outputs - inputs, outputs),)
            )
        elif (producer, consumer) in FUSED_VALUES:
            values = (outputs - inputs) // 2
            if not isinstance(head_dim, int) or values < head_dim or values % head_dim:
                continue
            whole = (range(outputs - values, outputs),)
            block = outputs * head_dim // values
            split = tuple(
                range(start - head_dim, start)
                for start in range(block, outputs + 1, block)
            )
            for rows in (whole, split):
                yield Place(name, (follower,), False, head_dim, rows)
        elif outputs == inputs:
            yield Place(name, (follower,), False)
        elif isinstance(head_dim, int) and not (outputs % head_dim or inputs % outputs):
            yield Place(name, (follower,), False, head_dim)


def norm_readers(layer: nn.Module, run: Callable[[], Any]) -> dict[str, list[str]]:
    """
    Linears and routers that read what a norm of a decoder layer puts out.

    :param run: calls the layer once
    """
    outputs: dict[str, Tensor] = {}
    readers: dict[str, list[str]] = {}

    def noted(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    def read(names: list[str]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            for norm, output in outputs.items():
                if any(_same_memory(x, output) for x in given):
                    known = readers.setdefault(norm, [])
                    known += [name for name in names if name not in known]

        return hook

    handles: list[Any] = []
    for name, module in layer.named_modules():
        if norm_offset(module) is not None:
            handles.append(module.register_forward_hook(noted(name)))
        weight = getattr(module, "weight", None)
        names = [name] if isinstance(weight, Tensor) and weight.ndim == 2 else []
        if name.rpartition(".")[2] == "experts":
            names = [
                f"{name}.{inner}"
                for inner, part in module.named_modules()
                if inner.endswith(_EXPERT_INPUTS) and hasattr(part, "weight")
            ]
        if names:
            handle = module.register_forward_pre_hook(read(names), with_kwargs=True)
            handles.append(handle)
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return readers


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float | None:
    """
    What a norm adds to its stored weight: 0, or 1 as in Gemma.

    Read off its output for a vector of mean zero and root mean square one, and for its
    negative, which tells the gain of a LayerNorm from its bias.

    :return: None if the module is no such norm, so that no scale folds into it
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or weight.is_meta:
        return None
    signs = torch.ones(1, 1, len(weight), dtype=weight.dtype, device=weight.device)
    signs[..., 1::2] = -1
    try:
        there, back = (norm(x) for x in (signs, -signs))
    except (TypeError, RuntimeError, ValueError):
        return None
    if not isinstance(there, Tensor) or there.shape != signs.shape:
        return None
    gain = ((there.float() - back.float()) / 2 * signs.float()).flatten()
    bias = ((there.float() + back.float()) / 2).flatten()
    stored = weight.detach().float()
    held = getattr(norm, "bias", None)
    held = torch.zeros_like(stored) if held is None else held.detach().float()
    if not torch.allclose(bias, held, rtol=2e-2, atol=1e-2):
        return None
    for offset in (0.0, 1.0):
        if torch.allclose(gain, stored + offset, rtol=2e-2, atol=1e-3):
            return offset
    return None


def stored_weight(module: nn.Module) -> Tensor:
    """A module's weight as it is, without gradient."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _is_foldable(module: nn.Module, size: int) -> bool:
    """Whether columns of a module's weight can be scaled, and are no other stage's."""
    shape = stored_weight(module).shape
    rows_first = isinstance(module, nn.Linear) or shape[0] != size
    other_stage = hasattr(module, "quantization_scheme")
    return rows_first and shape[1] == size and not other_stage


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _any_expert(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
