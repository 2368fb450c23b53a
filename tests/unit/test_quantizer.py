"""The learning quantiser against compressed-tensors' own, and its gradients."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc_faq_slider.slider.quantizer import (
    ActivationGrid,
    WeightGrid,
    quantized_columns,
)

pytestmark = pytest.mark.unit


def weight_like(rows, columns, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * scale


def weight_args(grid):
    return QuantizationArgs(
        num_bits=grid.num_bits,
        type="int",
        symmetric=grid.symmetric,
        strategy="group" if grid.group_size else "channel",
        group_size=grid.group_size,
    )


weight_grids = st.builds(
    WeightGrid,
    num_bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([None, 16, 32, 64]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


@given(grid=weight_grids, seed=st.integers(0, 2**20), shift=st.floats(-0.2, 0.2))
@settings(max_examples=150, deadline=None)
def test_weights_agree_with_compressed_tensors(grid, seed, shift):
    weight = weight_like(6, 128, seed) + shift
    lower, upper = grid.bounds(weight)
    scale, zero_point = grid.qparams(lower, upper)
    args = weight_args(grid)
    if grid.scale_dtype == torch.float32:
        their_scale, their_zero_point = calculate_qparams(lower, upper, args)
        torch.testing.assert_close(scale, their_scale)
        if zero_point is not None:
            assert torch.equal(zero_point, their_zero_point.float())
    assert torch.equal(scale, scale.to(grid.scale_dtype).float())
    signs = torch.tensor(grid.scale_signs)
    scale = scale * signs[torch.arange(scale.numel()) % len(signs)].view_as(scale)
    theirs = fake_quantize(
        weight,
        scale,
        torch.zeros_like(scale) if zero_point is None else zero_point,
        args,
    )
    ours = grid.fake_quantize(weight, scale, zero_point)
    assert torch.equal(ours, theirs)


@given(grid=weight_grids, seed=st.integers(0, 2**20))
@settings(max_examples=100, deadline=None)
def test_quantising_twice_changes_nothing(grid, seed):
    weight = weight_like(4, 128, seed)
    scale, zero_point = grid.qparams(*grid.bounds(weight))
    once = grid.fake_quantize(weight, scale, zero_point)
    assert torch.equal(grid.fake_quantize(once, scale, zero_point), once)


@given(
    group_size=st.sampled_from([None, 16, 32]),
    symmetric=st.booleans(),
    ratio=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=100, deadline=None)
def test_ratio_below_one_quantises_leading_groups_with_their_own_scales(
    group_size, symmetric, ratio, seed
):
    grid = WeightGrid(4, symmetric, group_size, torch.float32)
    weight = weight_like(5, 96, seed)
    scale, zero_point = grid.qparams(*grid.bounds(weight))
    full = grid.fake_quantize(weight, scale, zero_point)
    part = grid.fake_quantize(weight, scale, zero_point, ratio)
    columns = quantized_columns(ratio, 96, group_size)
    assert columns >= ratio * 96 and columns % (group_size or 1) == 0
    assert torch.equal(part[:, :columns], full[:, :columns])
    assert torch.equal(part[:, columns:], weight[:, columns:])


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_weight_and_scale(symmetric):
    grid = WeightGrid(3, symmetric, 8, torch.float32)
    weight = weight_like(2, 16, seed=1).requires_grad_()
    lower, upper = grid.bounds(weight)
    scale, zero_point = grid.qparams(0.7 * lower, 0.7 * upper)
    scale = scale.detach().requires_grad_()
    upstream = weight_like(2, 16, seed=2)
    (grid.fake_quantize(weight, scale, zero_point) * upstream).sum().backward()

    position = grid.grouped(weight.detach()) / scale.detach().unsqueeze(-1)
    zero = 0 if zero_point is None else zero_point.unsqueeze(-1)
    shifted = position + zero
    inside = (shifted >= grid.q_min - 0.5) & (shifted <= grid.q_max + 0.5)
    assert not inside.all(), "the clipped range must cut something off"
    codes = shifted.round().clamp(grid.q_min, grid.q_max) - zero
    torch.testing.assert_close(
        weight.grad, (grid.grouped(upstream) * inside).flatten(-2)
    )
    expected = (grid.grouped(upstream) * (codes - position * inside)).sum(-1)
    torch.testing.assert_close(scale.grad, expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_offset_moves_codes_and_its_gradient_points_where_they_move(sign):
    grid = WeightGrid(4, True, 8, torch.float32)
    weight = weight_like(2, 16, seed=1).requires_grad_()
    scale = sign * grid.qparams(*grid.bounds(weight))[0]
    offset = torch.full_like(weight, 0.5).mul_(weight.detach().sign()).requires_grad_()
    plain = grid.fake_quantize(weight, scale, None)
    moved = grid.fake_quantize(weight, scale, None, offset=offset)
    steps = (moved - plain).unflatten(-1, (-1, 8)) / scale.unsqueeze(-1)
    assert steps.abs().max() <= 1 + 1e-4 and steps.abs().mean() > 0.3
    moved.sum().backward()
    assert torch.equal(offset.grad, sign * weight.grad)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_stored_scale_keeps_its_sign_and_is_never_zero(scale_dtype):
    grid = WeightGrid(4, True, 8, scale_dtype)
    stored = grid.stored_scale(torch.tensor([[0.1, -0.1, 1e-45, -1e-45, 0.0]]))
    assert stored.sign().tolist() == [[1, -1, 1, -1, 1]]
    assert torch.equal(stored, stored.to(scale_dtype).float())


def test_stored_scale_passes_the_gradient_of_its_bound():
    grid = WeightGrid(4, True, None, torch.bfloat16)
    upper = torch.full((2, 1), 0.3, requires_grad=True)
    scale, _ = grid.qparams(torch.zeros(2, 1), upper)
    scale.sum().backward()
    torch.testing.assert_close(upper.grad, torch.full((2, 1), 1 / 7.5))


activation_grids = st.one_of(
    st.builds(
        ActivationGrid, num_bits=st.sampled_from([4, 8]), symmetric=st.booleans()
    ),
    st.just(ActivationGrid(8, is_float=True)),
)


@given(grid=activation_grids, seed=st.integers(0, 2**20), outlier=st.floats(1, 1e4))
@settings(max_examples=150, deadline=None)
def test_inputs_agree_with_compressed_tensors(grid, seed, outlier):
    x = weight_like(6, 64, seed, scale=1.0).view(2, 3, 64)
    x[0, 0, 5] *= outlier
    args = QuantizationArgs(
        num_bits=grid.num_bits,
        type="float" if grid.is_float else "int",
        symmetric=grid.symmetric,
        strategy="token",
        dynamic=True,
    )
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    theirs = fake_quantize(x, scale, zero_point, args)
    torch.testing.assert_close(grid.fake_quantize(x), theirs, rtol=0, atol=0)


def test_inputs_below_ratio_one_take_the_scale_of_the_whole_token():
    x = weight_like(3, 32, seed=3, scale=1.0)
    x[:, -1] = 40.0
    grid = ActivationGrid(8)
    before = x.clone()
    part = grid.fake_quantize(x, ratio=0.5)
    assert torch.equal(x, before)
    assert torch.equal(part[:, :16], grid.fake_quantize(x)[:, :16])
    assert torch.equal(part[:, 16:], x[:, 16:])


def test_inputs_pass_gradients_unchanged():
    x = weight_like(3, 32, seed=4).requires_grad_()
    upstream = weight_like(3, 32, seed=5)
    (ActivationGrid(4).fake_quantize(x, ratio=0.5) * upstream).sum().backward()
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("bad", [0.0, 1e-30])
def test_rows_without_values_stay_finite(bad):
    weight = torch.full((2, 32), bad)
    for symmetric in (True, False):
        grid = WeightGrid(4, symmetric, 16, torch.bfloat16)
        scale, zero_point = grid.qparams(*grid.bounds(weight))
        assert (scale > 0).all() and torch.isfinite(scale).all()
        assert torch.isfinite(grid.fake_quantize(weight, scale, zero_point)).all()
        x = ActivationGrid(8, symmetric).fake_quantize(weight)
        assert torch.isfinite(x).all()


def uneven_weight(seed, spread):
    """``[8, 128]``, its groups of 16 of sizes that differ by ``exp(spread)``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(8, 8, generator=generator))
    return weight_like(8, 128, seed) * sizes.repeat_interleave(16, 1)


@given(seed=st.integers(0, 2**20), spread=st.floats(0.0, 3.0))
@settings(max_examples=60, deadline=None)
def test_fp8_scales_survive_the_cutlass_loader(seed, spread):
    """The loader keeps a group scale as (row maximum / 448) x E4M3 / 8 x 8."""
    grid = WeightGrid(4, True, 16, torch.bfloat16, fp8_scales=True)
    weight = uneven_weight(seed, spread)
    scale, _ = grid.qparams(*grid.bounds(weight))
    unit = scale.amax(-1, keepdim=True) / 448
    steps = (scale / unit).to(torch.float8_e4m3fn).float()
    loaded = (steps / 8).to(torch.float8_e4m3fn).float() * 8 * unit
    # What remains is bf16's own rounding of the stored scale.
    assert ((loaded - scale).abs() / scale).max() <= 2**-8


@given(seed=st.integers(0, 2**20), spread=st.floats(0.0, 3.0))
@settings(max_examples=60, deadline=None)
def test_fp8_weights_are_those_of_the_cutlass_kernel(seed, spread):
    """As vLLM's own test of the kernel makes its reference: code x scale, in E4M3."""
    grid = WeightGrid(4, True, 16, torch.bfloat16, fp8_scales=True)
    weight = uneven_weight(seed, spread)
    scale, _ = grid.qparams(*grid.bounds(weight))
    stored = grid.fake_quantize(weight, scale, None)
    codes = (grid.grouped(stored) / scale.unsqueeze(-1)).round()

    unit = scale.amax(-1, keepdim=True) / 448
    group_scale = ((scale / unit).to(torch.float8_e4m3fn).float() / 8).to(
        torch.float8_e4m3fn
    )
    products = (codes * group_scale.float().unsqueeze(-1)).to(torch.float8_e4m3fn)
    expected = (products.float() * (8 * unit).unsqueeze(-1)).flatten(-2)

    served = grid.multiplied(stored, scale)
    assert torch.equal(served, expected)
    assert (served - stored).abs().max() > 0
    # Another rounding to the grid gives the codes back.
    assert torch.equal(grid.fake_quantize(served, scale, None), stored)
    half = grid.multiplied(stored, scale, 0.5)
    assert torch.equal(half[:, :64], expected[:, :64])
    assert torch.equal(half[:, 64:], stored[:, 64:])


def test_kernels_of_other_formats_multiply_what_is_stored():
    weight = weight_like(8, 64, 0)
    grid = WeightGrid(4, True, 16, torch.bfloat16)
    scale, _ = grid.qparams(*grid.bounds(weight))
    assert grid.multiplied(weight, scale) is weight


def test_the_kernels_rounding_passes_gradients():
    grid = WeightGrid(4, True, 16, torch.bfloat16, fp8_scales=True)
    weight = weight_like(8, 64, 0).requires_grad_()
    scale, _ = grid.qparams(*grid.bounds(weight))
    stored = grid.fake_quantize(weight, scale, None)
    upstream = weight_like(8, 64, 1)
    (direct,) = torch.autograd.grad(stored, weight, upstream, retain_graph=True)
    (served,) = torch.autograd.grad(grid.multiplied(stored, scale), weight, upstream)
    assert torch.equal(served, direct)
