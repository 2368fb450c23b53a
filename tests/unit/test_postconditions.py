"""Each check of a stage's result can fail, and says what is wrong."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from test_commit import quantizable_linear
from torch import nn

from llmc_faq_slider.host.commit import commit_linear
from llmc_faq_slider.host.postconditions import (
    check_committed,
    check_finite,
    check_folds,
    check_losses,
    conclude,
)
from llmc_faq_slider.slider.learning_state import WindowResult
from llmc_faq_slider.slider.quantizer import WeightGrid
from llmc_faq_slider.slider.student import FoldedLinear
from llmc_faq_slider.slider.windows import Window

pytestmark = pytest.mark.unit


def committed_linear(bits=4, symmetric=True, dtype=torch.bfloat16, weight=None):
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32
    )
    module = quantizable_linear(args, dtype)
    grid = WeightGrid(bits, symmetric, 32, dtype)
    weight = torch.randn(64, 128) * 0.04 if weight is None else weight
    scale, zero_point = grid.qparams(*grid.bounds(weight))
    commit_linear(module, FoldedLinear(weight, None, scale, zero_point))
    return module


def problems(module):
    return check_committed({"one": module}, {"one"})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_was_committed_passes(bits, symmetric, dtype):
    assert problems(committed_linear(bits, symmetric, dtype)) == []


def test_weights_of_zero_pass():
    assert problems(committed_linear(weight=torch.zeros(64, 128))) == []


def test_negative_scales_pass():
    module = committed_linear()
    weight = torch.randn(64, 128) * 0.04
    scale = -weight.unflatten(-1, (4, 32)).abs().amax(-1) / 7.5
    scale = scale.to(torch.bfloat16).float()
    commit_linear(module, FoldedLinear(weight, None, scale, None))
    assert problems(module) == []


@torch.no_grad()
def zero_scale(module):
    module.weight_scale[0, 0] = 0


@torch.no_grad()
def infinite_scale(module):
    module.weight_scale[0, 0] = torch.inf


@torch.no_grad()
def nan_weight(module):
    module.weight[0, 0] = torch.nan


@torch.no_grad()
def off_grid(module):
    module.weight[5, 7] += 0.3 * module.weight_scale[5, 0]


@torch.no_grad()
def small_codes(module):
    module.weight_scale *= 8
    module.weight.copy_(
        (module.weight / module.weight_scale.repeat_interleave(32, 1)).round()
        * module.weight_scale.repeat_interleave(32, 1)
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (zero_scale, "not finite and nonzero"),
        (infinite_scale, "not finite and nonzero"),
        (nan_weight, "weights that are not finite"),
        (off_grid, "has 1 weights beside the grid"),
        (small_codes, "uses a small part of its 16 codes"),
    ],
)
def test_what_was_spoilt_does_not(spoil, message):
    module = committed_linear()
    spoil(module)
    (problem,) = problems(module)
    assert problem.startswith("one ") and message in problem


def test_modules_left_out_are_named():
    module = committed_linear()
    (problem,) = check_committed({"one": module, "two": module}, {"one"})
    assert "quantised 1 of 2 layers; missing: two" in problem


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert check_finite(model) == []
    with torch.no_grad():
        model[1].bias[0] = -torch.inf
    assert check_finite(model) == ["1 weights hold NaN or infinity: 1.bias."]


def test_windows_that_ended_worse_are_named():
    def result(start, end):
        return WindowResult(Window(1, 3, "fixed"), start, end, 1.0)

    assert check_losses([result(1.0, 1.0), result(1.0, 0.5)]) == []
    assert "layers 1-2 ended at loss 2" in check_losses([result(1.0, 2.0)])[0]
    assert check_losses([result(1.0, torch.nan)])
    assert check_losses([result(torch.nan, torch.nan)])


def test_folds_that_differ_are_named():
    def found(error, weights, states):
        layers = {"first": nn.Linear(2, 2, dtype=weights)}
        return check_folds({0: error}, layers, states)

    assert found(1e-6, torch.float32, torch.float32) == []
    assert found(5e-4, torch.bfloat16, torch.bfloat16) == []
    # fp32 hidden states between bf16 weights, which the commit rounds
    assert found(5e-4, torch.bfloat16, torch.float32) == []
    assert found(5e-4, torch.float32, torch.float32)
    for error in (5e-3, torch.nan):
        (problem,) = found(error, torch.bfloat16, torch.float32)
        assert problem.startswith("first as committed differs")


def test_failures_become_warnings_without_strict():
    assert conclude([], strict=True) == []
    assert conclude(["a is wrong."], strict=False) == ["a is wrong."]
    with pytest.raises(RuntimeError, match="a is wrong.\nb is too.\n.*strict: false"):
        conclude(["a is wrong.", "b is too."], strict=True)
