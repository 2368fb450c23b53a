"""Reads number formats from compressed-tensors schemes, for learning on them."""

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
)
from torch import Tensor, nn

from llmc_faq_slider.slider.quantizer import ActivationGrid, WeightGrid
from llmc_faq_slider.slider.student import LinearGrids

__all__ = ["check_learnable", "linear_grids", "needs_pack_quantized"]


def check_learnable(scheme: QuantizationScheme) -> None:
    """
    :raises ValueError: if SliderQuant cannot learn the scheme
    """
    weights, inputs = scheme.weights, scheme.input_activations
    if (
        weights is None
        or weights.type != QuantizationType.INT
        or not 2 <= weights.num_bits <= 8
        or weights.strategy
        not in (QuantizationStrategy.CHANNEL, QuantizationStrategy.GROUP)
    ):
        raise ValueError(
            "SliderQuant learns integer weights of 2 to 8 bits with one scale per "
            f"channel or group; the recipe asks for {_describe(weights)}. Use "
            "QuantizationModifier for other formats."
        )
    if scheme.output_activations is not None:
        raise ValueError(
            "SliderQuant does not quantise output activations; the recipe asks for "
            f"{_describe(scheme.output_activations)}. Leave output_activations out."
        )
    if inputs is not None and (
        inputs.strategy != QuantizationStrategy.TOKEN
        or inputs.dynamic is not True
        or inputs.num_bits not in ((8,) if _is_float(inputs) else (4, 8))
    ):
        raise ValueError(
            "SliderQuant learns with dynamic per-token inputs in int4, int8 or fp8; "
            f"the recipe asks for {_describe(inputs)}. Set strategy: token and "
            "dynamic: true."
        )


def linear_grids(module: nn.Module) -> LinearGrids:
    """
    Number formats of a linear to which a scheme is attached.

    :raises ValueError: if SliderQuant cannot learn the scheme
    """
    scheme: QuantizationScheme = module.quantization_scheme
    check_learnable(scheme)
    weights, inputs = scheme.weights, scheme.input_activations
    assert weights is not None
    stored_scale = module.weight_scale
    assert isinstance(stored_scale, Tensor)
    group_size = (
        weights.group_size if weights.strategy == QuantizationStrategy.GROUP else None
    )
    weight_grid = WeightGrid(
        num_bits=weights.num_bits,
        symmetric=weights.symmetric,
        group_size=group_size,
        scale_dtype=stored_scale.dtype,
        fp8_scales=_is_w4afp8(scheme),
    )
    if inputs is None:
        return LinearGrids(weight_grid, None)
    return LinearGrids(
        weight_grid,
        ActivationGrid(inputs.num_bits, inputs.symmetric, _is_float(inputs)),
    )


def _is_float(inputs: QuantizationArgs) -> bool:
    return inputs.type == QuantizationType.FLOAT


def _is_w4afp8(scheme: QuantizationScheme) -> bool:
    """Whether vLLM's CUTLASS W4A8-FP8 kernel takes it and stores its scales in FP8."""
    weights, inputs = scheme.weights, scheme.input_activations
    return (
        weights is not None
        and inputs is not None
        and inputs.type == QuantizationType.FLOAT
        and weights.num_bits == 4
        and weights.symmetric
        and weights.strategy == QuantizationStrategy.GROUP
    )


def needs_pack_quantized(scheme: QuantizationScheme) -> bool:
    """
    Whether ``format`` must be set for vLLM's GPU kernels to take the checkpoint.

    compressed-tensors infers ``int-quantized`` for low-bit weights with quantised
    inputs, which no GPU kernel of vLLM loads.
    """
    return (
        scheme.format is None
        and scheme.weights is not None
        and scheme.weights.type == QuantizationType.INT
        and scheme.weights.num_bits < 8
    )


def _describe(args: QuantizationArgs | None) -> str:
    if args is None:
        return "no weight quantisation"
    kind, strategy = QuantizationType(args.type), QuantizationStrategy(args.strategy)
    return (
        f"{kind.value}{args.num_bits}, strategy {strategy.value}, "
        f"dynamic {str(args.dynamic).lower()}"
    )
