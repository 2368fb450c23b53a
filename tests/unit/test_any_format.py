"""Every learnable scheme on layers of any shape, against compressed-tensors."""

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from generated import cases
from hypothesis import strategies as st
from torch import nn

from llmc_faq_slider.host.commit import commit_linear
from llmc_faq_slider.host.grids import check_learnable, linear_grids
from llmc_faq_slider.slider.student import FoldedLinear

pytestmark = pytest.mark.unit


def learnable(name: str) -> bool:
    try:
        check_learnable(preset_name_to_scheme(name, ["Linear"]))
    except ValueError:
        return False
    return True


PRESETS = sorted(filter(learnable, PRESET_SCHEMES))


@st.composite
def schemes(draw: st.DrawFn) -> QuantizationScheme:
    """A preset, or any format of its own."""
    if draw(st.booleans()):
        return preset_name_to_scheme(draw(st.sampled_from(PRESETS)), ["Linear"])
    grouped = draw(st.booleans())
    weights = QuantizationArgs(
        num_bits=draw(st.integers(2, 8)),
        type="int",
        symmetric=draw(st.booleans()),
        strategy="group" if grouped else "channel",
        group_size=draw(st.sampled_from([1, 3, 8, 32, 128])) if grouped else None,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Linear, torch.Tensor]:
    """A linear with a scheme, and fp32 weights that may be zero, equal or extreme."""
    scheme = draw(schemes())
    assert scheme.weights is not None
    group = scheme.weights.group_size or draw(st.integers(1, 9))
    columns, rows = group * draw(st.integers(1, 5)), draw(st.integers(1, 7))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=dtype))
    config = QuantizationConfig(config_groups={"group_0": scheme})
    apply_quantization_config(model, config)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(rows, columns, generator=generator)
    weight *= draw(st.sampled_from([1e-3, 0.05, 1.0, 50.0]))
    weight += draw(st.sampled_from([0.0, 0.0, 0.3, -1.0]))
    spot = draw(st.sampled_from(["none", "zero row", "equal row", "outlier"]))
    if spot == "zero row":
        weight[0] = 0.0
    elif spot == "equal row":
        weight[0] = weight[0, 0]
    elif spot == "outlier":
        weight[0, 0] *= 100.0
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    return linear, weight


def test_presets_are_found() -> None:
    assert {"W4A16", "W4A8", "W8A8", "W4AFP8", "W4A16_ASYM"} <= set(PRESETS)
    assert "FP8" not in PRESETS


@cases(250, layer=layers())
def test_weights_are_those_of_compressed_tensors(layer) -> None:
    linear, weight = layer
    grid = linear_grids(linear).weight
    args = linear.quantization_scheme.weights
    scale, zero_point = grid.qparams(*grid.bounds(weight))
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point
    ours = grid.fake_quantize(weight, scale, zero_point)
    assert torch.equal(ours, fake_quantize(weight, scale, zeros, args))
    assert torch.isfinite(ours).all() and ours.shape == weight.shape
    assert torch.isfinite(scale).all() and (scale > 0).all()

    commit_linear(linear, FoldedLinear(weight, None, scale, zero_point))
    codes = quantize(weight, scale, zeros, args)
    saved = quantize(
        linear.weight, linear.weight_scale, linear.weight_zero_point, args
    ).float()
    assert saved.min() >= grid.q_min and saved.max() <= grid.q_max
    if args.num_bits < 7 or linear.weight.dtype != torch.bfloat16:
        assert torch.equal(saved, codes)
    else:
        assert (saved - codes).abs().max() <= 1
    assert torch.equal(linear.weight_scale.float(), scale)
