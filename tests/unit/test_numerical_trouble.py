"""Losses that are not finite, odd weights and data, 16-bit models."""

import pytest
import torch
from learning import LINEARS, learn, rows_of, settings

from llmc_faq_slider.host.decoder import calibration_samples
from llmc_faq_slider.slider.decoder import _InputSquares
from llmc_faq_slider.slider.learner import learn_windows
from llmc_faq_slider.slider.quantizer import WeightGrid
from llmc_faq_slider.slider.stream import capture_decoder
from llmc_faq_slider.slider.student import LinearGrids
from llmc_faq_slider.slider.windows import Window

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def assert_sound(results, committed):
    assert all(result.loss <= result.start_loss for result in results)
    for _, folded in committed:
        for linear in folded.linears.values():
            assert torch.isfinite(linear.weight).all()
            assert torch.isfinite(linear.scale).all() and (linear.scale != 0).all()


def test_rates_that_overflow_fall_back_to_the_start(model):
    rates = {"low_rank": 1e25, "clipping": 1e-2, "channel_scale": 1e-3}
    results, committed = learn(model, rows_of([16] * 8), learning_rates=rates)
    assert all(result.kept_start and result.retries == 2 for result in results)
    assert_sound(results, committed)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_bad_step_restarts_the_window_and_it_still_learns(model, value):
    layer, calls = model.model.layers[0], []

    def spoil_one(_module, _args, output):
        calls.append(torch.is_grad_enabled())
        return output * value if sum(calls) == 7 and calls[-1] else output

    layer.register_forward_hook(spoil_one)
    results, committed = learn(
        model, rows_of([16] * 8), epochs=20, learning_rates=fast_rates()
    )
    assert results[0].retries == 1
    assert not results[0].kept_start and results[0].loss < results[0].start_loss
    assert all(result.retries == 0 for result in results[1:])
    assert_sound(results, committed)


def fast_rates():
    return {"low_rank": 1e-2, "clipping": 1e-1, "channel_scale": 1e-2}


def test_a_model_that_overflows_is_named(model):
    model.model.layers[2].mlp.down_proj.weight.data *= 1e30
    model.model.layers[2].mlp.up_proj.weight.data *= 1e30
    with pytest.raises(ValueError, match="output of decoder layer 2 is not finite"):
        learn(model, rows_of([16] * 4))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_fp16_models_learn_in_fp32(model, compute):
    rows = rows_of([16] * 8)
    changes = dict(epochs=20, learning_rates=fast_rates(), compute_dtype=compute)
    full = learn(model, rows, **changes)
    half = learn(model.half(), rows, **changes)
    assert_sound(*half)
    assert all(result.loss < result.start_loss for result in half[0])
    # 20 epochs more than halve the output's error, with 16 bits of weights as well
    for results, _ in (full, half):
        assert results[-1].loss < 0.5 * max(result.start_loss for result in results)
    for linear in half[1][0][1].linears.values():
        assert linear.weight.dtype == linear.scale.dtype == torch.float32


def test_small_gradients_of_fp16_models_do_not_vanish(model):
    """A mean over many values has gradients below fp16's smallest number."""
    rows = rows_of([64] * 8)
    kinds = {}
    for dtype in (torch.float32, torch.float16):
        results, _ = learn(
            model.to(dtype), rows, batch_size=8, epochs=10, rounding_travel=0.0
        )
        kinds[dtype] = [result.loss for result in results]
    found, expected = kinds[torch.float16], kinds[torch.float32]
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected), rtol=0.1, atol=0.0
    )


def zero(weight):
    weight[3] = 0


def constant(weight):
    weight[3] = 0.02


def outlier(weight):
    weight[3, 5] = 1e3


def all_zero(weight):
    weight.zero_()


@pytest.mark.parametrize("spoil", [zero, constant, outlier, all_zero])
@pytest.mark.parametrize("symmetric", [True, False])
def test_degenerate_rows_of_weights(model, spoil, symmetric):
    with torch.no_grad():
        for layer in model.model.layers:
            spoil(layer.mlp.up_proj.weight)
    layers = list(model.model.layers)
    hidden, calls = capture_decoder(model, layers, rows_of([16] * 4), CPU)
    grids = LinearGrids(WeightGrid(4, symmetric, 16, torch.float32), None)
    committed = []
    learned = learn_windows(
        calls,
        hidden,
        {i: dict.fromkeys(LINEARS, grids) for i in range(5)},
        [Window(i, i + 2, "fixed") for i in range(4)],
        settings(),
        CPU,
        lambda index, folded: committed.append((index, folded)),
    )
    assert_sound(learned.windows, committed)


def test_rows_of_one_token_over_and_over(model):
    rows = [torch.full((16,), 7), torch.full((2,), 7), torch.full((16,), 0)]
    assert_sound(*learn(model, rows))


def test_samples_without_tokens_or_with_one_are_left_out():
    ids = torch.tensor([[7, 8, 9], [5, 6, 0], [1, 2, 3], [4, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
    batches = [{"input_ids": ids, "attention_mask": mask}]
    batches.append({"input_ids": torch.zeros(2, 0, dtype=torch.long)})
    rows, masks = calibration_samples(batches)
    assert [row.tolist() for row in rows] == [[5, 6], [7, 8, 9]]
    assert masks == [None, None]


def test_channels_that_calibration_leaves_silent_still_count():
    linear = torch.nn.Linear(4, 2)
    squares = _InputSquares(linear)
    handle = squares.attach()
    linear(torch.tensor([[[1.0, 0.0, 2.0, 0.0]]]))
    handle.remove()
    assert squares.tokens == 1
    torch.testing.assert_close(
        squares.mean(), torch.tensor([1.0, 1.25e-6, 4.0, 1.25e-6])
    )
    assert torch.equal(_InputSquares(linear).mean(), torch.ones(4))
