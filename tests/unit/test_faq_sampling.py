"""Sampling and scoring on the tiny family."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmc_faq_slider.faq import decoding
from llmc_faq_slider.faq.experts import mean_logprobs
from llmc_faq_slider.faq.sampling import Draw, pick, sample_batch
from llmc_faq_slider.faq.settings import Sampling

pytestmark = pytest.mark.unit

PROMPTS = [[5, 9, 200], [7, 300, 12, 40, 77, 5], [64]]
SAMPLING = Sampling(temperature=0.9, top_p=0.95, top_k=40, max_new_tokens=12)


@pytest.fixture(scope="module")
def model(small_model):
    loaded = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    return loaded.eval()


def test_pick_follows_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    uniforms = torch.linspace(0, 0.9999, 1000)
    drawn, logprob = pick(logits.repeat(1000, 1), uniforms, Sampling(1.0, 1.0, 0, 1))
    share = torch.bincount(drawn, minlength=4) / 1000
    assert torch.allclose(share, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.01)
    assert torch.allclose(logprob, logits[0, drawn])


def test_pick_cuts_by_top_k_and_top_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(500, 1)
    uniforms = torch.linspace(0, 0.9999, 500)
    assert pick(logits, uniforms, Sampling(1.0, 1.0, 2, 1))[0].unique().tolist() == [
        0,
        1,
    ]
    assert pick(logits, uniforms, Sampling(1.0, 0.6, 0, 1))[0].max() == 1
    assert pick(logits, uniforms, Sampling(0.01, 1.0, 0, 1))[0].max() == 0


def test_a_row_does_not_depend_on_its_batch(model) -> None:
    together = sample_batch(model, PROMPTS, [1, 2, 3], SAMPLING, {2})
    alone = [
        sample_batch(model, [prompt], [seed], SAMPLING, {2})[0]
        for prompt, seed in zip(PROMPTS, [1, 2, 3], strict=True)
    ]
    assert [d.ids for d in together] == [d.ids for d in alone]
    other = sample_batch(model, PROMPTS, [4, 5, 6], SAMPLING, {2})
    assert [d.ids for d in other] != [d.ids for d in together]


def test_rows_that_end_early_leave_the_others_alone(model) -> None:
    free = sample_batch(model, PROMPTS, [1, 2, 3], SAMPLING, set())
    end = free[0].ids[2]
    ended = sample_batch(model, PROMPTS, [1, 2, 3], SAMPLING, {end})
    for whole, cut in zip(free, ended, strict=True):
        assert isinstance(cut, Draw)
        assert cut.ids == whole.ids[: len(cut.ids)]
        assert cut.finished == (end in whole.ids)
        assert len(cut.logprobs) == len(cut.ids)
    assert len(ended[0].ids) <= 3


def test_answers_stay_inside_the_context(model, monkeypatch) -> None:
    monkeypatch.setattr(model.config, "max_position_embeddings", 10)
    draws = sample_batch(model, PROMPTS, [1, 2, 3], SAMPLING, set())
    assert [len(d.ids) for d in draws] == [7, 4, 9]


def test_global_random_state_is_left_alone(model) -> None:
    before = torch.get_rng_state()
    sample_batch(model, PROMPTS, [1, 2, 3], SAMPLING, {2})
    assert torch.equal(before, torch.get_rng_state())


def test_scores_equal_the_log_probabilities_of_sampling(model) -> None:
    draws = sample_batch(model, PROMPTS, [1, 2, 3], SAMPLING, {2})
    scores = mean_logprobs(model, PROMPTS, [d.ids for d in draws], chunk=5)
    sampled = [sum(d.logprobs) / len(d.logprobs) for d in draws]
    assert scores == pytest.approx(sampled, abs=1e-4)


def test_scores_equal_an_unpadded_forward(model) -> None:
    answer = [30, 31, 2]
    ids = torch.tensor([[*PROMPTS[1], *answer]])
    with torch.no_grad():
        logprobs = model(ids).logits.log_softmax(-1)
    start = len(PROMPTS[1]) - 1
    by_hand = sum(float(logprobs[0, start + i, t]) for i, t in enumerate(answer)) / 3
    both = mean_logprobs(model, PROMPTS[:2], [[9, 9, 9, 9], answer])
    assert both[1] == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoding_by_group_computes_what_torch_computes(
    small_model, implementation
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        small_model, dtype=torch.float32, attn_implementation=implementation
    ).eval()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    draws = sample_batch(model, PROMPTS, [1, 2, 3], SAMPLING, set())
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    for prompt, draw in zip(PROMPTS, draws, strict=True):
        ids = torch.tensor([[*prompt, *draw.ids]])
        with torch.no_grad():
            logprobs = model(ids, use_cache=False).logits.float().log_softmax(-1)
        told = logprobs[0, len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])
        torch.testing.assert_close(
            torch.tensor(draw.logprobs), told[:, 0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_one_query_attends_as_sdpa_does(mask) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, h, t, 8) for h, t in ((6, 1), (2, 9), (2, 9)))
    kept = torch.rand(3, 1, 1, 9) > 0.3
    kept[..., 0] = True
    given = {
        None: None,
        "bool": kept,
        "additive": torch.zeros(kept.shape).masked_fill(~kept, -1e30),
    }[mask]
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    expected, _ = sdpa_attention_forward(module, query, key, value, given, scaling=0.3)
    found, _ = decoding._attend(module, query, key, value, given, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_a_cache_that_grows_in_place_holds_what_a_growing_one_holds() -> None:
    torch.manual_seed(0)

    def states(rows, tokens):
        return torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4)

    plain, roomy = DynamicCache(), DynamicCache()
    first = states(3, 5)
    for cache in (plain, roomy):
        cache.update(*first, 0)
    decoding.in_place(roomy, torch.device("cpu"))
    rows = 3
    for step in range(150):
        if step == 70:
            rows = 2
            for cache in (plain, roomy):
                cache.batch_select_indices(torch.tensor([0, 2]))
        new = states(rows, 1)
        expected, found = plain.update(*new, 0), roomy.update(*new, 0)
        assert all(map(torch.equal, expected, found))
    assert plain.get_seq_length() == roomy.get_seq_length() == 155
