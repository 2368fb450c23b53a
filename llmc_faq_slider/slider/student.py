"""A decoder layer while it learns: its own modules with quantised, learnable linears.

The student shares all modules with the teacher. While
:meth:`StudentLayer.installed` is active the layer's linears compute with fake-quantised
folded weights and inputs, and its norms with their divided gains; outside it the layer
is the full-precision teacher.
:meth:`StudentLayer.fold` returns the plain tensors that a checkpoint stores.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmc_faq_slider.slider.forwards import replaced_forwards, shadowed_weight
from llmc_faq_slider.slider.learnables import (
    ChannelScale,
    Clipping,
    Kind,
    LowRank,
    NormChannelScale,
    RoundingOffset,
    smoothing_start,
)
from llmc_faq_slider.slider.places import Place, norm_offset, stored_weight
from llmc_faq_slider.slider.quantizer import ActivationGrid, WeightGrid

__all__ = [
    "FoldedLayer",
    "FoldedLinear",
    "LinearGrids",
    "QuantizedInputs",
    "StudentLayer",
]

FEW_BITS_STRENGTH = 0.7
Learnable = RoundingOffset | LowRank | Clipping | ChannelScale | NormChannelScale


@dataclass(frozen=True)
class LinearGrids:
    """Number formats of one linear; ``input`` None keeps its input as it is."""

    weight: WeightGrid
    input: ActivationGrid | None

    @property
    def few_bit_input(self) -> bool:
        """Whether the input is quantised to fewer than 8 bits."""
        return self.input is not None and self.input.num_bits < 8


@dataclass
class FoldedLinear:
    """
    What the checkpoint stores of one linear, all fp32.

    ``weight`` ``[out, in]`` is not yet rounded to the grid that ``scale`` and
    ``zero_point`` ``[out, groups]`` span.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    zero_point: Tensor | None


@dataclass
class FoldedLayer:
    """
    What a layer's checkpoint stores: quantised linears by name, and in ``plain`` the
    new tensors of norms and of linears that stay unquantised.
    """

    linears: dict[str, FoldedLinear]
    plain: dict[str, Tensor]


class StudentLinear:
    """One quantised linear: fixed fp32 weight and bias, and what is learned on it."""

    def __init__(
        self,
        module: nn.Linear,
        grids: LinearGrids,
        importance: Tensor,
        rank: int,
        rounding: bool,
        generator: torch.Generator,
    ):
        self.module = module
        self.grids = grids
        self.weight = module.weight.detach().float()
        self.bias = None if module.bias is None else module.bias.detach().float()
        self.low_rank = LowRank(self.weight, rank, generator) if rank else None
        self.rounding = RoundingOffset(self.weight) if rounding else None
        self.importance = importance
        self.input_scale: ChannelScale | NormChannelScale | None = None
        self.output_scale: ChannelScale | None = None

    @torch.no_grad()
    def start_clipping(self) -> None:
        """To be called when the channel scales are there."""
        importance = self.importance
        if self.input_scale is not None:
            importance = importance / self.input_scale.multiplier().square()
        self.clipping = Clipping(self.folded()[0], self.grids.weight, importance)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """
        Weight ``[out, in]`` with scales and low-rank update, and bias ``[out]``.

        Eq. (2): the scales come first, the update is added to the scaled weight.
        """
        weight, bias = self.weight, self.bias
        if self.input_scale is not None:
            weight = weight * self.input_scale.multiplier()
        if self.output_scale is not None:
            divisor = self.output_scale.divisor()
            weight = weight / divisor.unsqueeze(1)
            bias = None if bias is None else bias / divisor
        if self.low_rank is not None:
            weight = self.low_rank.apply(weight)
        return weight, bias

    def quantized(
        self, ratio: float, as_served: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """
        Folded weight on its grid (leading columns only below ratio 1), and bias.

        :param as_served: as the kernel multiplies it, not as the checkpoint stores it
        """
        weight, bias = self.folded()
        scale, zero_point = self.clipping.apply(weight)
        offset = None if self.rounding is None else self.rounding.offset
        weight = self.grids.weight.fake_quantize(
            weight, scale, zero_point, ratio, offset
        )
        if as_served:
            weight = self.grids.weight.multiplied(weight, scale, ratio)
        return weight, bias


class StudentLayer:
    """
    :param layer: decoder layer, called as transformers calls it
    :param grids: number formats by name of linear, relative to the layer
    :param importance: mean square of each input channel ``[in]`` by name of linear
    :param rank: rank of the low-rank update; 0 leaves it out
    :param rounding: learn an offset per weight before rounding
    :param places: where channel scales are learned; they must fold exactly there
    :param smoothing_strength: where they start, see :func:`smoothing_start`; ``auto``
        is :data:`FEW_BITS_STRENGTH` for inputs below 8 bits, else 0
    :param generator: seeds the low-rank update
    """

    def __init__(
        self,
        layer: nn.Module,
        grids: dict[str, LinearGrids],
        importance: dict[str, Tensor],
        rank: int,
        rounding: bool,
        places: Sequence[Place],
        smoothing_strength: float | Literal["auto"],
        generator: torch.Generator,
    ):
        self.layer = layer
        self.linears = {
            name: StudentLinear(
                layer.get_submodule(name),  # type: ignore[arg-type]
                grids[name],
                importance[name],
                rank,
                rounding,
                generator,
            )
            for name in grids
        }
        self.norm_scales: dict[str, NormChannelScale] = {}
        self.channel_scales: list[ChannelScale] = []
        self.readers: dict[str, ChannelScale | NormChannelScale] = {}
        for place in places:
            self._add_scale(place, smoothing_strength)
        for linear in self.linears.values():
            linear.start_clipping()

    def _add_scale(self, place: Place, strength: float | Literal["auto"]) -> None:
        scale: ChannelScale | NormChannelScale
        source = self.layer.get_submodule(place.source)
        consumers = [self.linears[n] for n in place.consumers if n in self.linears]
        readers = {
            name: self.layer.get_submodule(name)
            for name in place.consumers
            if name not in self.linears
        }
        importance = _mean_square(consumers)
        weights = [consumer.weight for consumer in consumers]
        weights += [stored_weight(reader).float() for reader in readers.values()]
        if strength == "auto":
            few_bits = consumers[0].grids.few_bit_input
            strength = FEW_BITS_STRENGTH if few_bits else 0.0
        if place.source_is_norm:
            offset = norm_offset(source)
            assert offset is not None
            scale = self.norm_scales[place.source] = NormChannelScale(
                stored_weight(source),
                offset,
                smoothing_start(importance, weights, strength),
            )
        else:
            producer = self.linears[place.source]
            channels = place.channels(len(producer.weight))
            repeats = len(importance) // len(channels)
            if place.head_dim is not None:
                # Query heads that share a value head share its scales.
                heads = (-1, repeats, place.head_dim)
                importance = importance.unflatten(0, heads).mean(1).flatten()
                weights = [weights[0].unflatten(1, heads).abs().amax(2).flatten(1)]
            scale = producer.output_scale = ChannelScale(
                smoothing_start(importance, weights, strength),
                place.head_dim,
                repeats,
                len(producer.weight),
                channels,
            )
            self.channel_scales.append(scale)
        for consumer in consumers:
            consumer.input_scale = scale
        self.readers |= dict.fromkeys(readers, scale)

    def learnables(self) -> list[Learnable]:
        found: list[Learnable] = [*self.norm_scales.values(), *self.channel_scales]
        for linear in self.linears.values():
            found.append(linear.clipping)
            if linear.low_rank is not None:
                found.append(linear.low_rank)
            if linear.rounding is not None:
                found.append(linear.rounding)
        return found

    def parameters(self, kind: Kind) -> list[Tensor]:
        return [
            parameter
            for learnable in self.learnables()
            if learnable.kind == kind
            for parameter in learnable.parameters()
        ]

    def state(self) -> list[Tensor]:
        """Copies of all learned tensors, for :meth:`restore`."""
        return [
            parameter.detach().clone()
            for learnable in self.learnables()
            for parameter in learnable.parameters()
        ]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        parameters = [p for x in self.learnables() for p in x.parameters()]
        for parameter, saved in zip(parameters, state, strict=True):
            parameter.copy_(saved)

    @contextmanager
    def installed(
        self, ratio: float, dtype: torch.dtype, as_served: bool = True
    ) -> Iterator[None]:
        """
        Make the layer's modules compute as the quantised student.

        :param ratio: intra-layer ratio; 0 quantises nothing (folds only)
        :param dtype: dtype of the matrix products
        :param as_served: False for weights as they are stored and unquantised inputs
        """
        inputs = QuantizedInputs(ratio if as_served else 0.0)
        forwards: dict[nn.Module, Any] = {
            linear.module: quantized_forward(linear, ratio, dtype, inputs, as_served)
            for linear in self.linears.values()
        }
        with ExitStack() as stack:
            for name, norm_scale in self.norm_scales.items():
                norm = self.layer.get_submodule(name)
                hook = divide_output(norm_scale.multiplier())
                stack.callback(norm.register_forward_hook(hook).remove)
            for name in self.readers:
                reader = self.layer.get_submodule(name)
                weight = self._folded_reader(name).to(stored_weight(reader).dtype)
                stack.enter_context(shadowed_weight(reader, weight))
            stack.enter_context(replaced_forwards(forwards))
            yield

    @torch.no_grad()
    def fold(self) -> FoldedLayer:
        """What was learned, as the tensors that the checkpoint will hold."""
        linears = {}
        for name, linear in self.linears.items():
            weight, bias = linear.folded()
            scale, zero_point = linear.clipping.apply(weight)
            if linear.rounding is not None:
                weight, _ = linear.quantized(1.0, as_served=False)
            linears[name] = FoldedLinear(weight, bias, scale, zero_point)
        plain = {}
        for name, norm_scale in self.norm_scales.items():
            plain[f"{name}.weight"] = norm_scale.folded()
            bias = getattr(self.layer.get_submodule(name), "bias", None)
            if bias is not None:
                plain[f"{name}.bias"] = bias.float() / norm_scale.multiplier()
        for name in self.readers:
            plain[f"{name}.weight"] = self._folded_reader(name)
        return FoldedLayer(linears, plain)

    def _folded_reader(self, name: str) -> Tensor:
        """fp32 weight, with its scales, of a reader that stays unquantised."""
        weight = stored_weight(self.layer.get_submodule(name)).float()
        return weight * self.readers[name].multiplier()


def _mean_square(consumers: Sequence[StudentLinear]) -> Tensor:
    """Of the inputs that all consumers read, of which an expert sees a part."""
    found: list[Tensor] = []
    for consumer in consumers:
        if not any(torch.equal(consumer.importance, known) for known in found):
            found.append(consumer.importance)
    return found[0] if len(found) == 1 else torch.stack(found).mean(0)


class QuantizedInputs:
    """Quantises a linear's input once for all linears that read it in turn."""

    def __init__(self, ratio: float):
        self.ratio = ratio
        self.latest: tuple[Tensor, ActivationGrid, Tensor] | None = None

    def __call__(self, x: Tensor, grid: ActivationGrid | None) -> Tensor:
        if grid is None or not self.ratio:
            return x
        if self.latest is None or self.latest[0] is not x or self.latest[1] != grid:
            self.latest = (x, grid, grid.fake_quantize(x, self.ratio))
        return self.latest[2]


def quantized_forward(
    linear: StudentLinear,
    ratio: float,
    dtype: torch.dtype,
    inputs: QuantizedInputs,
    as_served: bool,
) -> Any:
    """Forward of an ``nn.Linear`` with the student's weight, bias and input grid."""
    weight, bias = linear.quantized(ratio, as_served) if ratio else linear.folded()
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)

    def forward(x: Tensor) -> Tensor:
        quantized = inputs(x, linear.grids.input).to(dtype)
        return F.linear(quantized, weight, bias).to(x.dtype)

    return forward


def divide_output(divisor: Tensor) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return (output.float() / divisor).to(output.dtype)

    return hook
