import pytest
import torch
from learning import CPU, LINEARS, rows_of

from llmc_faq_slider.slider.closing import ClosingSettings, _ScaleTuning, tune_scales
from llmc_faq_slider.slider.head import OutputHead, frozen
from llmc_faq_slider.slider.quantizer import ActivationGrid, WeightGrid
from llmc_faq_slider.slider.stream import capture_decoder
from llmc_faq_slider.slider.student import FoldedLinear, LinearGrids
from llmc_faq_slider.slider.tuned_linear import TunedLinear

pytestmark = pytest.mark.unit


@pytest.fixture
def rows():
    return rows_of([24] * 8)


def nearest(weight, grid):
    scale, zero_point = grid.qparams(*grid.bounds(weight))
    quantized = grid.fake_quantize(weight, scale, zero_point)
    return FoldedLinear(quantized, None, scale, zero_point)


def tuned_linears(layers, grid, input_grid=None):
    grids = LinearGrids(grid, input_grid)
    return {
        index: {
            name: TunedLinear(
                layer.get_submodule(name),
                grids,
                nearest(layer.get_submodule(name).weight.detach().float(), grid),
            )
            for name in LINEARS
        }
        for index, layer in enumerate(layers)
    }


def close(model, rows, grid, rate, input_grid=None, epochs=4, batch_size=4):
    layers = list(model.model.layers)
    hidden, calls = capture_decoder(model, layers, rows, CPU)
    with torch.no_grad():
        targets = [calls.run_span(range(len(layers)), row) for row in hidden]
    linears = tuned_linears(layers, grid, input_grid)
    settings = ClosingSettings(epochs, rate, batch_size, torch.float32, 0)
    with frozen(model):
        head = OutputHead(model, calls)
        result = tune_scales(calls, head, linears, hidden, targets, settings, CPU)
    return result, linears


@pytest.mark.parametrize(
    "grid",
    [
        WeightGrid(2, True, 16, torch.float32),
        WeightGrid(3, False, None, torch.bfloat16),
    ],
)
def test_codes_stand_and_the_divergence_falls(model, rows, grid):
    result, linears = close(model, rows, grid, 1e-2, ActivationGrid(8))
    assert not result.kept_start and result.loss < result.start_loss
    for linear in linears[0].values():
        before = nearest(linear.module.weight.detach().float(), grid)
        after = linear.fold()
        assert not torch.equal(after.scale, before.scale)
        assert torch.equal(after.scale, after.scale.to(grid.scale_dtype).float())
        codes = grid.grouped(before.weight) / before.scale.unsqueeze(-1)
        tuned = grid.grouped(after.weight) / after.scale.unsqueeze(-1)
        assert torch.equal(codes.round(), tuned.round())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rates_are_in_steps_of_the_largest_code(model, rows, bits):
    grid = WeightGrid(bits, True, 16, torch.float32)
    result, linears = close(model, rows, grid, 1e-3, epochs=1, batch_size=len(rows))
    assert not result.kept_start
    # AdamW's first step is its rate, whatever the gradient.
    moved = max(abs(x.factor - 1).max().item() for x in linears[0].values())
    assert moved * 2 ** (bits - 1) == pytest.approx(1e-3, rel=0.01)


def test_scales_that_end_worse_are_put_back(model, rows):
    grid = WeightGrid(4, True, 16, torch.float32)
    result, linears = close(model, rows, grid, 30.0)
    assert result.kept_start
    for linear in linears[0].values():
        assert torch.equal(linear.fold().scale, linear.scale)


def test_the_models_own_parameters_collect_no_gradients(model, rows):
    close(model, rows, WeightGrid(4, True, 16, torch.float32), 1e-3)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_head_gives_the_models_own_log_probabilities(model, rows):
    layers = list(model.model.layers)
    hidden, calls = capture_decoder(model, layers, rows, CPU)
    head = OutputHead(model, calls)
    with torch.no_grad():
        expected = model(input_ids=rows[0].unsqueeze(0)).logits.log_softmax(-1)
        found = head.log_probabilities(calls.run_span(range(len(layers)), hidden[0]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("rise", "kept"), [(1.9, False), (2.1, True)])
def test_an_end_may_judge_worse_on_the_rows_that_windows_fit(
    model, rows, monkeypatch, rise, kept
):
    judged = iter([1.0, rise])
    monkeypatch.setattr(_ScaleTuning, "judge", lambda _: next(judged))
    result, linears = close(model, rows, WeightGrid(4, True, 16, torch.float32), 1e-2)
    assert (result.kept_start, result.loss) == (kept, 1.0 if kept else rise)
    factors = [linear.factor for linear in linears[0].values()]
    assert all(bool((f == 1).all()) == kept for f in factors)
