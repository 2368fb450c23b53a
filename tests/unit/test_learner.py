"""The learning loop on a small random decoder: arithmetic and bookkeeping."""

import pytest
import torch
from learning import CPU, LINEARS, learn, rows_of

from llmc_faq_slider.host.decoder import calibration_rows, decoder_layers
from llmc_faq_slider.slider.learner import (
    stage_ratios,
)
from llmc_faq_slider.slider.loss import token_errors
from llmc_faq_slider.slider.stream import capture_decoder, row_batches
from llmc_faq_slider.slider.windows import window_schedule

pytestmark = pytest.mark.unit


def test_every_layer_is_committed_once_in_order(model):
    results, committed = learn(model, rows_of([16] * 8))
    assert [index for index, _ in committed] == [0, 1, 2, 3, 4]
    assert len(results) == len(window_schedule(5))
    assert all(set(folded.linears) == set(LINEARS) for _, folded in committed)


def test_learning_lowers_the_loss_of_every_window(model):
    results, _ = learn(model, rows_of([16] * 8), epochs=20)
    assert all(result.loss < result.start_loss for result in results)


def test_later_visits_have_lower_rates(model):
    kept, _ = learn(model, rows_of([16] * 8), ratio=1.0, epochs=20)
    # The second visit would have 1e-9 of the rates: nothing is left to learn.
    rates = {"visit_decay": 30.0, "ratio": 1.0, "epochs": 20}
    decayed, _ = learn(model, rows_of([16] * 8), **rates)
    assert kept[0].loss == decayed[0].loss < kept[0].start_loss
    last = decayed[-1]
    assert last.loss == pytest.approx(last.start_loss, rel=1e-3)
    assert kept[-1].loss < 0.99 * kept[-1].start_loss


def test_a_worse_end_is_replaced_by_the_start(model):
    wild = {"low_rank": 50.0, "clipping": 50.0, "channel_scale": 50.0}
    results, committed = learn(model, rows_of([16] * 4), learning_rates=wild)
    assert any(result.kept_start for result in results)
    assert all(result.loss <= result.start_loss for result in results)
    for _, folded in committed:
        for linear in folded.linears.values():
            assert torch.isfinite(linear.weight).all() and (linear.scale != 0).all()


def test_same_seed_same_result_other_seed_another(model):
    def weights(seed):
        _, committed = learn(model, rows_of([16] * 4), seed=seed)
        return committed[-1][1].linears["mlp.down_proj"].weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_stream_equals_the_model_for_rows_of_all_lengths(model):
    rows = rows_of([5, 16, 5, 9])
    layers = list(model.model.layers)
    hidden, calls = capture_decoder(model, layers, rows, CPU)
    for row, states in zip(rows, hidden, strict=True):
        with torch.no_grad():
            expected = model.model(row[None], output_hidden_states=True).hidden_states
            assert torch.equal(states, expected[0])
            middle = calls.run_span(range(0, 3), states)
        torch.testing.assert_close(middle, expected[3])


def test_chain_that_skips_a_layer_is_refused(model):
    class Doubling(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, **kwargs):
            return self.layer(hidden_states * 2, **kwargs)

    inner = list(model.model.layers)
    model.model.layers[2] = Doubling(model.model.layers[2])
    with pytest.raises(ValueError, match="Decoder layer 2 does not take the output"):
        capture_decoder(model, inner, rows_of([8]), CPU)


def test_intra_layer_ratios():
    assert stage_ratios(1.0) == [1.0]
    assert stage_ratios(0.5) == [0.5, 1.0]
    assert stage_ratios(0.25) == [0.25, 0.5, 0.75, 1.0]
    assert stage_ratios(1 / 3)[-1] == 1.0


def test_token_errors_do_not_depend_on_a_tokens_magnitude():
    target = torch.randn(1, 3, 8)
    output = target + 0.1 * torch.randn(1, 3, 8)
    massive = torch.tensor([1.0, 1000.0, 1.0]).view(1, 3, 1)
    torch.testing.assert_close(
        token_errors(output * massive, target * massive), token_errors(output, target)
    )


def test_batches_hold_rows_of_one_length_and_all_rows():
    lengths = [4, 8, 4, 4, 8, 2]
    batches = list(row_batches(lengths, 2, [5, 4, 3, 2, 1, 0]))
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4, 5]
    assert all(len({lengths[i] for i in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) == 2


def test_rows_lose_their_padding():
    ids = torch.tensor([[7, 8, 9, 0], [0, 0, 5, 6], [1, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]])
    rows = calibration_rows([{"input_ids": ids, "attention_mask": mask}])
    assert [row.tolist() for row in rows] == [[5, 6], [7, 8, 9]]
    with pytest.raises(ValueError, match="only the columns \\['pixel_values'\\]"):
        calibration_rows([{"pixel_values": ids}])


def test_decoder_layers_of_another_class_are_named():
    with pytest.raises(ValueError, match="no module is of class Nothing"):
        decoder_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["Nothing"])


def test_decoder_layers_are_found(model):
    names = [name for name, _ in decoder_layers(model)]
    assert names == [f"model.layers.{i}" for i in range(5)]
