"""What of a model a SliderQuant stage quantises."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from torch import nn

from llmc_faq_slider.host.checks import outside_layers, targeted_linears
from llmc_faq_slider.host.decoder import decoder_layers, split_targets
from llmc_faq_slider.host.grids import linear_grids
from llmc_faq_slider.slider.student import LinearGrids
from llmc_faq_slider.slider.windows import Window

__all__ = ["TargetedLayers", "targeted_layers"]


@dataclass(frozen=True)
class TargetedLayers:
    """
    :param names: of all decoder layers, in order
    :param modules: the same layers
    :param linears: targeted linears by name in the model
    :param grids: their number formats by layer index and name within the layer
    """

    names: list[str]
    modules: list[nn.Module]
    linears: dict[str, nn.Module]
    grids: dict[int, dict[str, LinearGrids]]

    def of(self, window: Window) -> list[tuple[nn.Module, dict[str, LinearGrids]]]:
        """Layers of a window, each with the formats of its linears."""
        return [(self.modules[i], self.grids.get(i, {})) for i in window.layers]

    def by_name(self) -> dict[str, nn.Module]:
        return dict(zip(self.names, self.modules, strict=True))

    def modules_by_layer(self) -> dict[int, dict[str, nn.Module]]:
        """Targeted linears by layer index and name within the layer."""
        return {
            index: {name: self.modules[index].get_submodule(name) for name in names}
            for index, names in self.grids.items()
        }

    def for_learning(self, quantized_inputs: bool | Literal["auto"]) -> Self:
        """
        The same layers; inputs that windows are not to learn on have no format.

        :param quantized_inputs: ``auto`` keeps those of fewer than 8 bits
        """

        def learned(grids: LinearGrids) -> LinearGrids:
            auto = quantized_inputs == "auto"
            keeps = grids.few_bit_input if auto else quantized_inputs
            return grids if keeps else replace(grids, input=None)

        return replace(
            self,
            grids={
                index: {name: learned(grids) for name, grids in linears.items()}
                for index, linears in self.grids.items()
            },
        )


def targeted_layers(
    model: nn.Module,
    stage: QuantizationMixin,
    sequential_targets: str | list[str] | None,
) -> TargetedLayers:
    """
    :param sequential_targets: class names of decoder layers, None for the model's own
    :raises ValueError: if no linear is targeted, or one outside the decoder layers
    """
    layers = decoder_layers(model, sequential_targets)
    linears = targeted_linears(model, stage)
    inside, outside = split_targets(layers, linears)
    if outside:
        raise ValueError(outside_layers(outside, [name for name, _ in layers]))
    return TargetedLayers(
        [name for name, _ in layers],
        [layer for _, layer in layers],
        linears,
        {
            index: {name: linear_grids(module) for name, module in modules.items()}
            for index, modules in inside.items()
        },
    )
