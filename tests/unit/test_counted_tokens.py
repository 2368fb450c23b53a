"""Errors that count only on the tokens of responses."""

import pytest
import torch
from learning import CPU, LINEARS, rows_of, settings

from llmc_faq_slider.host.decoder import calibration_samples, counted_tokens
from llmc_faq_slider.slider.head import OutputHead, divergences
from llmc_faq_slider.slider.learner import learn_windows
from llmc_faq_slider.slider.loss import (
    CountedTokens,
    judged_rows,
    output_loss,
    token_errors,
)
from llmc_faq_slider.slider.quantizer import WeightGrid
from llmc_faq_slider.slider.stream import capture_decoder
from llmc_faq_slider.slider.student import LinearGrids
from llmc_faq_slider.slider.windows import Window

pytestmark = pytest.mark.unit


def last(length, marked):
    return (torch.arange(length) >= length - marked).unsqueeze(0)


def test_masks_come_with_their_rows_and_without_padding():
    ids = torch.tensor([[7, 8, 9, 0], [0, 1, 5, 6]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]),
        "loss_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]),
    }
    plain = {"input_ids": torch.tensor([[2, 3]])}
    rows, masks = calibration_samples([batch, plain])
    assert [row.tolist() for row in rows] == [[2, 3], [5, 6], [7, 8, 9]]
    assert masks[0] is None
    assert [m.tolist() for m in masks[1:]] == [[[True, False]], [[False, False, True]]]


def test_rows_without_a_mask_count_fully():
    tokens = CountedTokens([4, 4, 4], [last(4, 1), None, last(4, 0)])
    assert [tokens.count([i]) for i in range(3)] == [1, 4, 0]
    assert tokens.count([0, 1]) == 5
    assert tokens.mask([0, 1], CPU).tolist() == [[False] * 3 + [True], [True] * 4]
    assert tokens.mask([1], CPU) is None
    assert judged_rows(tokens) == [0, 1]


def test_no_token_left_is_refused():
    with pytest.raises(ValueError, match="all 2 calibration rows are zero"):
        counted_tokens(rows_of([4, 4]), [last(4, 0), last(4, 0)])


def test_loss_is_the_mean_over_marked_tokens(model):
    output, target = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    mask = torch.cat([last(4, 1), last(4, 3)])
    errors = token_errors(output, target)
    expected = (errors[0, 3] + errors[1, 1:].sum()) / 4
    torch.testing.assert_close(output_loss(output, target, mask), expected)

    hidden, calls = capture_decoder(model, list(model.model.layers), rows_of([4]), CPU)
    head = OutputHead(model, calls)
    found = divergences(head, output, target, mask)
    alone = divergences(head, output[mask].unsqueeze(0), target[mask].unsqueeze(0))
    assert found.shape == (1, 4)
    torch.testing.assert_close(found, alone)


def learn(model, rows, tokens, batch_size):
    """Error of the whole student on marked tokens, after learning."""
    layers = list(model.model.layers)[:2]
    hidden, calls = capture_decoder(model, layers, rows, CPU)
    grids = LinearGrids(WeightGrid(2, True, 16, torch.float32), None)
    return learn_windows(
        calls,
        hidden,
        {i: dict.fromkeys(LINEARS, grids) for i in range(2)},
        [Window(0, 2, "fixed")],
        settings(epochs=30, ratio=1.0, batch_size=batch_size),
        CPU,
        lambda index, folded: None,
        tokens=tokens,
    ).windows[0]


def test_learning_serves_the_marked_tokens(model):
    rows = rows_of([32] * 8)
    masks = CountedTokens([32] * 8, [last(32, 3)] * 8)
    marked = learn(model, rows, masks, 4)
    every = learn(model, rows, CountedTokens.all([32] * 8), 4)
    assert marked.loss / marked.start_loss < every.loss / every.start_loss


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rows_whose_mask_is_zero_do_no_harm(model, batch_size):
    masks = [last(16, 4) if i % 2 else last(16, 0) for i in range(8)]
    result = learn(model, rows_of([16] * 8), CountedTokens([16] * 8, masks), batch_size)
    assert result.loss < result.start_loss and result.retries == 0
