"""Which places channel scales really fold at, found by computation.

A place is proposed by the names of modules. Whether anything else reads what its source
puts out, or computes between source and consumers, shows when scales far from one
change what the layer puts out although nothing is quantised.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from llmc_faq_slider.slider.learnables import ChannelScale, NormChannelScale
from llmc_faq_slider.slider.places import Place, fold_places
from llmc_faq_slider.slider.stream import DecoderCalls
from llmc_faq_slider.slider.student import LinearGrids, StudentLayer

__all__ = ["exact_places", "left_out"]

# Tried scales are powers of two between 2^-6 and 2^6: a clamp comes into reach, and
# multiplying by them rounds nothing.
LARGEST_EXPONENT = 6
# Squared change of a token's output relative to the square of what the layer adds to
# it. In 16 bits rounded gains of norms move it by 1e-4; another reader moves it by one
# and more.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@torch.no_grad()
def exact_places(
    calls: DecoderCalls, index: int, grids: Mapping[str, LinearGrids]
) -> tuple[list[Place], list[Place]]:
    """
    Places of a decoder layer at which channel scales change nothing, and the others.

    :param calls: with the layers in full precision
    :param grids: number formats by name of linear within the layer
    """
    proposed = fold_places(calls.layers[index], set(grids))
    if not proposed or _unchanged(calls, index, grids, proposed):
        return proposed, []
    exact = [p for p in proposed if _unchanged(calls, index, grids, [p])]
    if len(exact) > 1 and not _unchanged(calls, index, grids, exact):
        exact = []
    return exact, [p for p in proposed if p not in exact]


def left_out(places: Mapping[int, list[Place]]) -> list[str]:
    """Sentences on places that are left out, by layer index; they are logged too."""
    kinds = Counter(
        (place.source, place.consumers) for layer in places.values() for place in layer
    )
    said = [
        f"SliderQuant learns no channel scales between {source} and "
        f"{', '.join(consumers)} in {layers} layers: scales would change there what "
        "the layer computes."
        for (source, consumers), layers in kinds.items()
    ]
    for sentence in said:
        logger.warning(sentence)
    return said


def _unchanged(
    calls: DecoderCalls,
    index: int,
    grids: Mapping[str, LinearGrids],
    places: list[Place],
) -> bool:
    layer = calls.layers[index]
    hidden = calls.dry.states[index].to(calls.device)
    generator = torch.Generator().manual_seed(index)
    named = {name for place in places for name in (place.source, *place.consumers)}
    concerned = {name: grid for name, grid in grids.items() if name in named}
    student = StudentLayer(
        layer,
        concerned,
        {name: _ones(layer.get_submodule(name)) for name in concerned},
        0,
        False,
        places,
        0.0,
        generator,
    )
    scales: list[ChannelScale | NormChannelScale] = [
        *student.norm_scales.values(),
        *student.channel_scales,
    ]
    for scale in scales:
        exponents = torch.randint(
            -LARGEST_EXPONENT,
            LARGEST_EXPONENT + 1,
            scale.factor.shape,
            generator=generator,
        )
        scale.factor.copy_(2.0**exponents)
    before = _tensors(calls.whole_output(index, hidden))
    with student.installed(0.0, hidden.dtype):
        after = _tensors(calls.whole_output(index, hidden))
    added = before[0].float() - hidden.float()
    if not _close(after[0], before[0], added):
        return False
    pairs = zip(after[1:], before[1:], strict=True)
    return all(_close(one, other, other) for one, other in pairs)


def _ones(linear: Any) -> Tensor:
    return torch.ones(linear.weight.shape[1], device=linear.weight.device)


def _tensors(output: Any) -> list[Tensor]:
    """Floating tensors of a layer's output, hidden states first."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in _tensors(value)]
    return []


def _close(one: Tensor, other: Tensor, added: Tensor) -> bool:
    """Whether every token's values differ by rounding alone."""
    change = (one.float() - other.float()).square().sum(-1)
    size = added.float().square().sum(-1)
    rounding = (torch.finfo(other.dtype).eps * other.float()).square().sum(-1)
    tolerance = TOLERANCE.get(other.dtype, TOLERANCE[torch.bfloat16])
    return bool((change <= tolerance * size + rounding).all())
