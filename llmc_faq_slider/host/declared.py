"""What a recipe's stages declare to vLLM, as plain config groups.

Private upstream API: ``compressed_tensors.compressors.format.infer_module_format``, by
which the format of a saved group is chosen where the recipe names none.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
)
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from torch import nn

__all__ = ["DeclaredGroup", "declared_groups", "plain_group", "quantising_stages"]


@dataclass(frozen=True)
class DeclaredGroup:
    """One config group of a stage, in the form that ``report.serving`` reads."""

    stage: QuantizationMixin
    name: str
    targets: list[str]
    group: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{type(self.stage).__name__}.{self.name}"


def quantising_stages(modifiers: Iterable[Modifier]) -> list[QuantizationMixin]:
    """Stages that declare a number format."""
    return [
        modifier
        for modifier in modifiers
        if isinstance(modifier, QuantizationMixin) and modifier.has_config()
    ]


def declared_groups(modifiers: Iterable[Modifier]) -> Iterator[DeclaredGroup]:
    """Config groups with quantised weights, stage by stage."""
    for stage in quantising_stages(modifiers):
        for name, scheme in stage.resolved_config.config_groups.items():
            assert isinstance(scheme, QuantizationScheme)
            if scheme.weights is not None:
                yield DeclaredGroup(
                    stage, name, list(scheme.targets), plain_group(scheme)
                )


def plain_group(scheme: QuantizationScheme) -> dict[str, Any]:
    """A scheme as plain values, with the format in which it will be saved."""
    saved = scheme.format or infer_module_format(nn.Linear, scheme)
    return {
        "weights": _plain(scheme.weights),
        "inputs": _plain(scheme.input_activations),
        "outputs": _plain(scheme.output_activations),
        "format": getattr(saved, "value", saved),
    }


def _plain(args: QuantizationArgs | None) -> dict[str, Any] | None:
    if args is None:
        return None
    strategy = QuantizationStrategy(args.strategy)
    actorder = getattr(args.actorder, "value", args.actorder)
    grouped = strategy in (
        QuantizationStrategy.GROUP,
        QuantizationStrategy.TENSOR_GROUP,
    )
    return {
        "type": getattr(args.type, "value", args.type),
        "num_bits": args.num_bits,
        "strategy": strategy.value,
        "group_size": args.group_size if grouped else None,
        "symmetric": args.symmetric,
        "dynamic": getattr(args.dynamic, "value", args.dynamic),
        "actorder": actorder,
    }
