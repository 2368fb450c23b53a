"""Which places channel scales really fold at, found by computation.

What a place is proposed for is what a layer is seen to read, and what its modules are
called. Whether anything else reads what its source puts out, or computes between source
and consumers, shows when scales far from one change what the layer puts out although
nothing is quantised.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from llmc_faq_slider.slider.forwards import shadowed_weight
from llmc_faq_slider.slider.learnables import ChannelScale
from llmc_faq_slider.slider.places import (
    Place,
    fold_places,
    norm_readers,
    stored_weight,
)
from llmc_faq_slider.slider.stream import DecoderCalls
from llmc_faq_slider.slider.student import LinearGrids

__all__ = ["exact_places", "left_out"]

# Tried scales are powers of two: multiplying by them rounds nothing, and a clamp comes
# into reach. The numbers of fp16 end at 65504.
LARGEST_EXPONENT = {torch.float16: 3}
# Squared change of a token's output, relative to the square of what the layer adds.
TOLERANCE = 1e-5


@torch.no_grad()
def exact_places(
    calls: DecoderCalls, index: int, grids: Mapping[str, LinearGrids]
) -> tuple[list[Place], list[Place]]:
    """
    Places of a decoder layer at which channel scales change nothing, and the others.

    Places of all experts are tried together: a row reaches some, and all are alike.

    :param calls: with the layers in full precision
    :param grids: number formats by name of linear within the layer
    """
    layer = calls.layers[index]
    hidden = calls.dry.states[index].to(calls.device)
    run = partial(calls.whole_output, index, hidden)
    before: list[Tensor] = []
    readers = norm_readers(layer, lambda: before.extend(_tensors(run())))

    def unchanged(places: Sequence[Place]) -> bool:
        generator = torch.Generator().manual_seed(index)
        with _scaled(layer, places, set(grids), generator):
            after = _tensors(run())
        added = before[0].float() - hidden.float()
        pairs = zip(after[1:], before[1:], strict=True)
        return _close(after[0], before[0], added) and all(
            _close(one, other, other) for one, other in pairs
        )

    kinds: dict[Any, list[list[Place]]] = defaultdict(list)
    for ways in fold_places(layer, set(grids), readers):
        kinds[ways[0].kind].append(ways)
    exact: list[Place] = []
    others: list[Place] = []
    for proposed in kinds.values():
        tried = [list(way) for way in zip(*proposed, strict=False)]
        found = next((places for places in tried if unchanged(places)), None)
        exact += found or []
        others += tried[0] if found is None else []
    if exact and not unchanged(exact):
        exact, others = [], others + exact
    return exact, others


def left_out(places: Mapping[int, list[Place]]) -> list[str]:
    """Sentences on places that are left out, by layer index; they are logged too."""
    layers: dict[Any, set[int]] = defaultdict(set)
    for index, found in places.items():
        for place in found:
            layers[place.kind].add(index)
    said = [
        f"SliderQuant learns no channel scales between {source} and "
        f"{', '.join(consumers)} in {len(indices)} layers: scales would change there "
        "what the layer computes."
        for (source, consumers), indices in layers.items()
    ]
    for sentence in said:
        logger.warning(sentence)
    return said


@contextmanager
def _scaled(
    layer: nn.Module,
    places: Sequence[Place],
    linears: set[str],
    generator: torch.Generator,
) -> Iterator[None]:
    """Scale between sources and consumers with random powers of two."""

    def multiplied(factor: Tensor) -> Any:
        return lambda _module, args: (args[0] * factor.to(args[0].dtype), *args[1:])

    def divided(factor: Tensor) -> Any:
        return lambda _module, _args, output: output / factor.to(output.dtype)

    with ExitStack() as stack:
        for place in places:
            source = layer.get_submodule(place.source)
            weight = stored_weight(source)
            channels = place.channels(len(weight))
            largest = LARGEST_EXPONENT.get(weight.dtype, 6)
            exponents = torch.randint(
                -largest, largest + 1, (len(channels),), generator=generator
            )
            divisor = multiplier = (2.0**exponents).to(weight.device)
            if not place.source_is_norm:
                inputs = stored_weight(layer.get_submodule(place.consumers[0])).shape[1]
                scale = ChannelScale(
                    divisor,
                    place.head_dim,
                    inputs // len(channels),
                    len(weight),
                    channels,
                )
                divisor, multiplier = scale.divisor(), scale.multiplier()
            hooks = [source.register_forward_hook(divided(divisor))]
            for name in place.consumers:
                reader = layer.get_submodule(name)
                if name in linears:
                    hook = multiplied(multiplier)
                    hooks.append(reader.register_forward_pre_hook(hook))
                else:
                    folded = stored_weight(reader)
                    folded = folded * multiplier.to(folded.dtype)
                    stack.enter_context(shadowed_weight(reader, folded))
            for handle in hooks:
                stack.callback(handle.remove)
        yield


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
    return bool((change <= TOLERANCE * size + rounding).all())
