"""Writes folded layers into the model, exactly as the checkpoint will restore them.

Private upstream API: none. ``update_offload_parameter`` and ``quantize`` /
``dequantize`` are public functions of compressed-tensors.
"""

from collections.abc import Mapping

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from torch import Tensor, nn

from llmc_faq_slider.host.targets import TargetedLayers
from llmc_faq_slider.slider.student import FoldedLayer, FoldedLinear
from llmc_faq_slider.slider.tuned_linear import TunedLinear

__all__ = ["LayerCommits", "commit_layer", "commit_linear"]

WRITTEN = ("weight", "weight_scale", "weight_zero_point")


class LayerCommits:
    """
    The layers that a stage has written.

    :param layers: those it is to write
    :param keeps_codes: a closing pass follows, which tunes ``tuned``

    ``touched`` are the names within each layer of the tensors that were written.
    """

    def __init__(self, layers: TargetedLayers, keeps_codes: bool):
        self.layers = layers
        self.keeps_codes = keeps_codes
        self.written: set[nn.Module] = set()
        self.tuned: dict[int, dict[str, TunedLinear]] = {}
        self.touched: dict[int, list[str]] = {}

    def layer(self, index: int, folded: FoldedLayer) -> None:
        """Write what the windows learned of a layer."""
        layer = self.layers.modules[index]
        commit_layer(layer, folded)
        self.touched[index] = [
            f"{name}.{tensor}"
            for name, linear in folded.linears.items()
            for tensor in (*WRITTEN, *(["bias"] if linear.bias is not None else []))
        ] + [*folded.plain]
        self._note(index, folded.linears)

    def _note(self, index: int, linears: Mapping[str, FoldedLinear]) -> None:
        layer, grids = self.layers.modules[index], self.layers.grids[index]
        self.written.update(layer.get_submodule(name) for name in linears)
        if self.keeps_codes:
            self.tuned[index] = {
                name: TunedLinear(layer.get_submodule(name), grids[name], linear)
                for name, linear in linears.items()
            }

    def tensors(self, index: int) -> dict[str, Tensor]:
        """What was written into a layer, by name within it."""
        layer = self.layers.modules[index]
        return {name: _tensor(layer, name).detach() for name in self.touched[index]}

    def restore(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write what :meth:`tensors` gave."""
        layer = self.layers.modules[index]
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            update_offload_parameter(layer.get_submodule(module), last, tensor)
        self.touched[index] = [*tensors]
        linears = {}
        for name, grids in self.layers.grids[index].items():
            weight, scale, zero_point = (
                _tensor(layer, f"{name}.{last}").detach().float() for last in WRITTEN
            )
            linears[name] = FoldedLinear(
                weight, None, scale, None if grids.weight.symmetric else zero_point
            )
        self._note(index, linears)

    def tuned_scales(self) -> None:
        """Write what the closing pass made of the scales."""
        for index, linears in self.tuned.items():
            folded = {name: linear.fold() for name, linear in linears.items()}
            commit_layer(self.layers.modules[index], FoldedLayer(folded, {}))

    def names(self) -> set[str]:
        """Targeted linears that were written, by name in the model."""
        return {n for n, m in self.layers.linears.items() if m in self.written}


def _tensor(layer: nn.Module, name: str) -> Tensor:
    module, _, last = name.rpartition(".")
    found = getattr(layer.get_submodule(module), last)
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def commit_layer(layer: nn.Module, folded: FoldedLayer) -> None:
    """Write a folded decoder layer into its modules."""
    for name, linear in folded.linears.items():
        commit_linear(layer.get_submodule(name), linear)
    for name, tensor in folded.plain.items():
        module, _, last = name.rpartition(".")
        stored = tensor.to(_tensor(layer, name).dtype)
        update_offload_parameter(layer.get_submodule(module), last, stored)


@torch.no_grad()
def commit_linear(module: nn.Module, folded: FoldedLinear) -> None:
    """
    Write scale, zero point, and the weight on their grid.

    The codes are computed in fp32 from the learned weight. Saving computes them again
    from the stored weight, in the weight's dtype; where that would give another code,
    the stored weight moves to the neighbouring number that gives the right one. The
    module computes with ``code * scale`` either way. bf16 has too few digits for some
    7 and 8-bit codes above 64: those, about one in a hundred, end one step off.

    :raises RuntimeError: if a code of fewer bits cannot be restored
    """
    args: QuantizationArgs = module.quantization_scheme.weights  # type: ignore
    stored = module.weight
    assert isinstance(stored, Tensor)
    stored_scale = module.weight_scale
    assert isinstance(stored_scale, Tensor)
    scale = folded.scale.to(stored_scale.dtype)
    zero_point = (
        torch.zeros_like(folded.scale)
        if folded.zero_point is None
        else folded.zero_point
    )
    codes = quantize(folded.weight, scale.float(), zero_point, args)
    weight = dequantize(codes, scale, zero_point, args, dtype=stored.dtype)
    zero_point = zero_point.to(module.weight_zero_point.dtype)  # type: ignore
    weight = _restorable(weight, codes, scale, zero_point, args)

    update_offload_parameter(module, "weight_scale", scale)
    update_offload_parameter(module, "weight_zero_point", zero_point)
    update_offload_parameter(module, "weight", weight)
    if folded.bias is not None:
        bias = module.bias
        assert isinstance(bias, Tensor)
        update_offload_parameter(module, "bias", folded.bias.to(bias.dtype))


def _restorable(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    args: QuantizationArgs,
) -> Tensor:
    def lost(candidate: Tensor) -> Tensor:
        return quantize(candidate, scale, zero_point, args).float() != codes

    wrong = lost(weight)
    if not wrong.any():
        return weight
    result = weight.clone()
    for direction in (torch.inf, -torch.inf):
        neighbour = weight
        for _ in range(2):
            neighbour = torch.nextafter(
                neighbour, torch.full_like(neighbour, direction)
            )
            fixed = wrong & ~lost(neighbour)
            result = torch.where(fixed, neighbour, result)
            wrong = wrong & ~fixed
    if wrong.any() and args.num_bits < 7:
        raise RuntimeError(
            f"{int(wrong.sum())} of {wrong.numel()} integer codes would change when "
            f"the checkpoint is saved in {weight.dtype}. Load the model in float32."
        )
    return result
