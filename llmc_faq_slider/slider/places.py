"""Where channel scales may fold in a decoder layer (SliderQuant §3.3, eq. 2).

Four places, named by the submodules that Llama, Qwen2, Qwen3, Mistral and Gemma3 share:
norm → q, k, v; norm → gate, up; v → o; up → down. Names only propose: in other
architectures the same names compute something else, which ``folds`` finds. The
released code's fifth place, between q and k, is left out: it is not exact under rotary
embeddings and wrong when norms sit on q and k.
"""

from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Place", "fold_places", "norm_offset"]

NORM_PLACES = (
    (("input_layernorm",), "self_attn", ("q_proj", "k_proj", "v_proj")),
    (
        ("pre_feedforward_layernorm", "post_attention_layernorm"),
        "mlp",
        ("gate_proj", "up_proj"),
    ),
)
LINEAR_PLACES = (
    ("self_attn.v_proj", "self_attn.o_proj"),
    ("mlp.up_proj", "mlp.down_proj"),
)


@dataclass(frozen=True)
class Place:
    """
    One set of scales: it divides what ``source`` puts out, and multiplies the input
    columns of ``consumers``. Names are relative to the decoder layer.
    """

    source: str
    consumers: tuple[str, ...]
    source_is_norm: bool


def fold_places(layer: nn.Module, linears: set[str]) -> list[Place]:
    """
    Places of a decoder layer whose linears are all among ``linears``.

    A linear that this stage does not quantise belongs to another stage, or to nobody,
    and is left as it is.
    """
    modules = dict(layer.named_modules())
    places = []
    for norms, parent, names in NORM_PLACES:
        consumers = tuple(f"{parent}.{name}" for name in names)
        norm = next((name for name in norms if name in modules), None)
        if norm is not None and linears.issuperset(consumers):
            places.append(Place(norm, consumers, source_is_norm=True))
    for producer, consumer in LINEAR_PLACES:
        if linears.issuperset((producer, consumer)):
            places.append(Place(producer, (consumer,), source_is_norm=False))
    return places


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float | None:
    """
    What an RMSNorm adds to its stored weight: 0, or 1 as in Gemma.

    Read off the norm's output for a vector of ones, whose root mean square is one.

    :return: None if the module is no such norm, so that no scale folds into it
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return None
    gain = norm(torch.ones(1, 1, len(weight), dtype=weight.dtype, device=weight.device))
    gain, stored = gain.float().flatten(), weight.detach().float()
    for offset in (0.0, 1.0):
        if torch.allclose(gain, stored + offset, rtol=2e-2, atol=1e-3):
            return offset
    return None
