"""Where weight clipping starts: share of the range and sign of the scale."""

import pytest
import torch

from llmc_faq_slider.slider.learnables import Clipping
from llmc_faq_slider.slider.quantizer import WeightGrid

pytestmark = pytest.mark.unit


def skewed(rows=8, columns=128, seed=0):
    """Groups whose tail lies above zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).exp() - 1.0


def error(weight, grid):
    with torch.no_grad():
        scale, zero_point = Clipping(weight, grid, torch.ones(128)).apply(weight)
        quantized = grid.fake_quantize(weight, scale, zero_point)
    return (quantized - weight).square().mean().item()


def test_scale_turns_negative_where_the_tail_is_positive():
    grid = WeightGrid(2, True, 32, torch.float32)
    tail_above, _ = Clipping(skewed(), grid, torch.ones(128)).apply(skewed())
    tail_below, _ = Clipping(-skewed(), grid, torch.ones(128)).apply(-skewed())
    assert (tail_above < 0).float().mean() > 0.8
    assert torch.equal(tail_above, -tail_below)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sign_leaves_the_error_of_mirrored_weights_equal(bits):
    grid = WeightGrid(bits, True, 32, torch.float32)
    assert error(skewed(), grid) == pytest.approx(error(-skewed(), grid), rel=1e-6)


@pytest.mark.parametrize(
    "grid",
    [
        WeightGrid(4, True, None, torch.float32),
        WeightGrid(8, True, 32, torch.float32),
        WeightGrid(4, False, 32, torch.float32),
        WeightGrid(4, True, 32, torch.bfloat16, fp8_scales=True),
    ],
    ids=["channel", "8 bits", "asymmetric", "fp8 scales"],
)
def test_scale_stays_positive_where_a_sign_is_not_served(grid):
    scale, _ = Clipping(skewed(), grid, torch.ones(128)).apply(skewed())
    assert (scale > 0).all()
