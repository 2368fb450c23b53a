"""Codes that were learned are the codes that a save computes from the module."""

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import quantize
from torch import nn

from llmc_faq_slider.host.commit import commit_linear
from llmc_faq_slider.slider.quantizer import WeightGrid
from llmc_faq_slider.slider.student import FoldedLinear

pytestmark = pytest.mark.unit


def quantizable_linear(args, dtype):
    model = nn.Sequential(nn.Linear(128, 64, bias=False, dtype=dtype))
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme})
    )
    return model[0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_saving_restores_the_learned_codes(bits, symmetric, group_size, dtype):
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="group" if group_size else "channel",
        group_size=group_size,
    )
    module = quantizable_linear(args, dtype)
    grid = WeightGrid(bits, symmetric, group_size, dtype)
    weight = torch.randn(64, 128) * 0.04 + 0.005
    scale, zero_point = grid.qparams(*(0.8 * b for b in grid.bounds(weight)))
    commit_linear(module, FoldedLinear(weight, None, scale, zero_point))

    learned = quantize(
        weight,
        scale,
        torch.zeros_like(scale) if zero_point is None else zero_point,
        args,
    )
    saved = quantize(
        module.weight, module.weight_scale, module.weight_zero_point, args
    ).float()
    off = (saved - learned).abs()
    if bits < 7 or dtype != torch.bfloat16:
        assert torch.equal(saved, learned)
    else:
        assert off.max() <= 1 and (off > 0).float().mean() < 0.02
    assert torch.equal(module.weight_scale.float(), scale)
