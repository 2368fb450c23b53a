"""Rows at a time: estimated, and halved when memory runs out."""

import os
import resource

import pytest
import torch
from learning import CPU, LINEARS, rows_of, settings
from test_checkpoint import in_a_process

from llmc_faq_slider.slider.learner import learn_windows
from llmc_faq_slider.slider.loss import CountedTokens
from llmc_faq_slider.slider.memory import (
    RowLimit,
    advice,
    free_bytes,
    out_of_memory,
    rows_that_fit,
    step_bytes,
)
from llmc_faq_slider.slider.quantizer import WeightGrid
from llmc_faq_slider.slider.row_losses import accumulate_gradients
from llmc_faq_slider.slider.stream import capture_decoder
from llmc_faq_slider.slider.student import LinearGrids
from llmc_faq_slider.slider.windows import window_schedule

pytestmark = pytest.mark.unit

MIB = 2**20


def learn(model, limit, room=None, channel_scales=False):
    """Losses, with a device that has room for so many rows in one pass."""
    layers = list(model.model.layers)
    hidden, calls = capture_decoder(model, layers, rows_of([16] * 8), CPU)

    def full(_module, args):
        if room is not None and len(args[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    handle = layers[1].register_forward_pre_hook(full)
    grids = LinearGrids(WeightGrid(2, True, 16, torch.float32), None)
    learned = learn_windows(
        calls,
        hidden,
        {i: dict.fromkeys(LINEARS, grids) for i in range(len(layers))},
        window_schedule(len(layers)),
        settings(
            batch_size=8,
            epochs=6,
            rounding_travel=0.0,
            channel_scales=channel_scales,
        ),
        CPU,
        lambda index, folded: None,
        limit=limit,
    )
    handle.remove()
    return torch.tensor([result.loss for result in learned.windows])


def test_smaller_pieces_learn_the_same(model):
    expected = learn(model, RowLimit(8))
    limit = RowLimit(8)
    found = learn(model, limit, room=3)
    assert limit.rows == 2
    # sums in another order, which AdamW blows up where gradients are nearly zero
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("room", [1, 3, 8])
def test_smaller_pieces_have_the_same_gradients(room):
    torch.manual_seed(0)
    data, weight = torch.randn(5, 4), torch.zeros(4, requires_grad=True)
    lengths = [3, 1, 4, 1, 5]

    def row_loss(rows):
        """Mean over the tokens of some rows, each of which has the same error."""
        if len(rows) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        errors = (data[rows] @ weight - 1).square()
        return errors @ torch.tensor(
            [lengths[i] / sum(lengths[j] for j in rows) for i in rows]
        )

    def clear():
        weight.grad = None

    (expected,) = torch.autograd.grad(
        (data @ weight - 1).square() @ (torch.tensor(lengths) / sum(lengths)), weight
    )
    loss = accumulate_gradients(
        row_loss,
        list(range(5)),
        CountedTokens.all(lengths),
        RowLimit(8),
        torch.amp.GradScaler(enabled=False),
        clear,
    )
    assert loss == pytest.approx(1.0)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("channel_scales", [True, False])
def test_one_row_that_does_not_fit_ends_with_advice(model, channel_scales):
    with pytest.raises(MemoryError, match="does not fit.*Take a larger device"):
        learn(model, RowLimit(8), room=0, channel_scales=channel_scales)


def test_what_cannot_be_deterministic_is_done_all_the_same():
    limit, undone = RowLimit(4), []

    def work():
        if limit.reproducible:
            raise RuntimeError("cumsum does not have a deterministic implementation")
        return limit.rows

    assert limit.run(work, lambda: undone.append(True)) == 4
    assert undone == [True]


def test_other_errors_are_not_taken_for_memory():
    def work():
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        RowLimit(4).run(work)
    assert not out_of_memory(RuntimeError("shape mismatch"))


def allocate_more_than_there_is():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * MIB, used + 300 * MIB))
    limit = RowLimit(8)
    limit.run(lambda: torch.zeros(limit.rows * 64 * MIB, dtype=torch.uint8))
    os._exit(10 + limit.rows)


def test_the_machines_own_memory_error_is_known():
    assert in_a_process(allocate_more_than_there_is) in (12, 14)


def test_advice_names_what_is_large():
    gib = 2**30
    wide = advice(layers=4, weights=30 * gib, row=gib, closing=8 * gib)
    assert wide.index("shallow_layers and deep_layers") < wide.index(
        "closing_epochs: 0"
    )
    assert "30.0 GiB of weights" in wide and "shorter rows" not in wide
    long = advice(layers=2, weights=gib, row=20 * gib, closing=0)
    assert "20.0 GiB of activations" in long and "shorter rows" in long
    assert "window_size" not in long and "closing_epochs" not in long
    narrow = advice(layers=2, weights=20 * gib, row=gib, closing=0)
    assert "window_size: 1, or rounding_travel: 0" in narrow


def test_estimate():
    linears = [torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)]
    fixed, each = step_bytes([linears, linears[:1]], tokens=10, logits=100)
    assert fixed == 2 * 64 * 128 * 4 * 8 + 100 * 4 * 5
    assert each == 2 * (64 + 128) * 10 * 12
    assert rows_that_fit(8, fixed=100, each=100, free=None) == 8
    assert rows_that_fit(8, fixed=100, each=100, free=1000) == 8
    assert rows_that_fit(8, fixed=100, each=100, free=900) == 4
    assert rows_that_fit(8, fixed=100, each=100, free=10) == 1


def test_free_memory_of_this_machine():
    free = free_bytes(CPU)
    assert free is None or MIB < free < 2**50
