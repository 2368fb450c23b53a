"""The stage as a function, with a generator that writes what the test says."""

import json
import random
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from generated import cases
from hypothesis import strategies as st
from scribe import SETTINGS, Scribe, source
from transformers import AutoTokenizer, GenerationConfig

from llmc_faq_slider.faq.competition import RegenerationError, losses
from llmc_faq_slider.faq.generators import resolve_sampling
from llmc_faq_slider.faq.preparation import Task, batches, conversation, prepare
from llmc_faq_slider.faq.regenerate import regenerate
from llmc_faq_slider.faq.rendering import encode, end_of_turn_id
from llmc_faq_slider.faq.sampling import Draw
from llmc_faq_slider.faq.seeds import Seed
from llmc_faq_slider.faq.settings import GateLimits, Sampling
from llmc_faq_slider.faq.store import Store

pytestmark = pytest.mark.unit

SEEDS = [Seed("prompt", text=f"question {i}") for i in range(10)]


@pytest.fixture
def scribe(tokenizer):
    return Scribe(end_of_turn_id(tokenizer), 30)


def run(tokenizer, scribe, folder, settings=SETTINGS, seeds=SEEDS, **changes):
    return regenerate(
        seeds, tokenizer, source(tokenizer, scribe, **changes), settings, Store(folder)
    )


def test_rows_are_full_and_token_exact(tokenizer, scribe, tmp_path) -> None:
    result = run(tokenizer, scribe, tmp_path)
    assert result.input_ids.shape == result.loss_mask.shape == (4, 64)
    assert not result.reused
    talk = conversation(tokenizer, source(tokenizer, scribe), SETTINGS)
    prompts = {tuple(prepare(Task(seed), [], talk).target_ids) for seed in SEEDS}
    ids = result.input_ids.reshape(-1).tolist()
    mask = result.loss_mask.reshape(-1).tolist()
    # runs of prompt and answer take turns; only the last run can be cut
    runs = [[i for _, i in run] for _, run in groupby(zip(mask, ids), lambda p: p[0])]
    for prompt, answer in zip(runs[:-1:2], runs[1:-1:2], strict=False):
        assert tuple(prompt) in prompts
        assert len(answer) == 31
        assert answer.count(scribe.end_id) == 1 and answer[-1] == scribe.end_id
    assert len(runs) > 6
    assert result.manifest["counts"]["candidates"] == len(scribe.requests)


def test_an_unchanged_run_opens_no_generator(tokenizer, scribe, tmp_path) -> None:
    first = run(tokenizer, scribe, tmp_path)
    again = run(tokenizer, scribe, tmp_path, seeds=SEEDS[::-1])
    assert scribe.opened == 1
    assert again.reused and torch.equal(first.input_ids, again.input_ids)
    assert again.manifest == first.manifest


@pytest.mark.parametrize(
    "change",
    [
        {"selector": "random"},
        {"gates": GateLimits(min_response_tokens=5)},
        {"num_samples": 3},
        {"max_fallback_fraction": 0.2},
    ],
)
def test_selection_settings_generate_nothing(
    tokenizer, scribe, tmp_path, change
) -> None:
    run(tokenizer, scribe, tmp_path)
    changed = run(tokenizer, scribe, tmp_path, replace(SETTINGS, **change))
    assert scribe.opened == 1 and not changed.reused


def test_more_candidates_only_add(tokenizer, scribe, tmp_path) -> None:
    run(tokenizer, scribe, tmp_path)
    rows = len(scribe.requests)
    run(tokenizer, scribe, tmp_path, replace(SETTINGS, num_candidates=4))
    assert len(scribe.requests) == 2 * rows


@pytest.mark.parametrize(
    "change",
    [
        {"settings": replace(SETTINGS, seed=1)},
        {"settings": replace(SETTINGS, chain_of_thought=True)},
        {"seeds": SEEDS[:9]},
        {"identity": {"kind": "test", "weights": "1"}},
    ],
)
def test_what_decides_answers_regenerates(tokenizer, scribe, tmp_path, change) -> None:
    run(tokenizer, scribe, tmp_path)
    assert not run(tokenizer, scribe, tmp_path, **change).reused
    assert scribe.opened == 2


def test_the_same_candidates_give_the_same_bytes(tokenizer, scribe, tmp_path) -> None:
    def files():
        return {p.name: p.read_bytes() for p in tmp_path.glob("datasets/*/*")}

    run(tokenizer, scribe, tmp_path)
    before = files()
    for path in tmp_path.glob("datasets/*/*"):
        path.unlink()
    run(tokenizer, scribe, tmp_path)
    assert files() == before and scribe.opened == 1


def test_a_damaged_data_set_is_built_anew(tokenizer, scribe, tmp_path) -> None:
    first = run(tokenizer, scribe, tmp_path)
    data = next(tmp_path.glob("datasets/*/calibration.safetensors"))
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    again = run(tokenizer, scribe, tmp_path)
    assert not again.reused and scribe.opened == 1
    assert torch.equal(first.input_ids, again.input_ids)


def test_a_run_that_was_killed_goes_on(tokenizer, scribe, tmp_path) -> None:
    whole = run(tokenizer, scribe, tmp_path / "whole")
    rows = len(scribe.requests)
    log = next((tmp_path / "whole").glob("candidates/*/candidates.jsonl"))
    cut = tmp_path / "cut" / "candidates" / log.parent.name / log.name
    cut.parent.mkdir(parents=True)
    cut.write_bytes(log.read_bytes()[:-40])
    again = run(tokenizer, scribe, tmp_path / "cut")
    assert torch.equal(whole.input_ids, again.input_ids)
    assert 0 < len(scribe.requests) - rows <= SETTINGS.batch_size
    assert cut.read_bytes() == log.read_bytes()


def test_a_spoilt_line_is_named(tokenizer, scribe, tmp_path) -> None:
    run(tokenizer, scribe, tmp_path)
    log = next(tmp_path.glob("candidates/*/candidates.jsonl"))
    log.write_text("{}\n" + log.read_text())
    for path in tmp_path.glob("datasets/*/*"):
        path.unlink()
    with pytest.raises(ValueError, match="line 1 of .*candidates.jsonl"):
        run(tokenizer, scribe, tmp_path)


def test_few_seeds_are_answered_anew(tokenizer, scribe, tmp_path) -> None:
    result = run(tokenizer, scribe, tmp_path, seeds=SEEDS[:1])
    assert result.manifest["counts"]["prompts_answered"] > 1
    log = next(tmp_path.glob("candidates/*/candidates.jsonl")).read_text()
    ids = {json.loads(line)["prompt_id"] for line in log.splitlines()}
    assert {SEEDS[0].id, f"{SEEDS[0].id}#1"} <= ids


def test_too_few_tokens_is_a_clear_error(tokenizer, scribe, tmp_path) -> None:
    settings = replace(SETTINGS, num_samples=400)
    with pytest.raises(RegenerationError, match="16 rounds .* are needed"):
        run(tokenizer, scribe, tmp_path, settings, SEEDS[:1])


def babble(end_id):
    return lambda request: Draw([7] * 30 + [end_id], True, [-1.0] * 31)


def test_a_generator_that_only_babbles_is_given_up(tokenizer, scribe, tmp_path) -> None:
    scribe.write = babble(scribe.end_id)
    with pytest.raises(RegenerationError, match="0 of 32 prompts .* repetitive"):
        run(tokenizer, scribe, tmp_path, seeds=SEEDS[:4])
    asked = len(scribe.requests)
    assert asked == 32 * SETTINGS.num_candidates
    # loosening the gate that fired goes on with what was written, as the message says
    loose = replace(SETTINGS.gates, max_repeated_share=1.0)
    settings = replace(SETTINGS, gates=loose, num_samples=1)
    with pytest.raises(RegenerationError, match="duplicate"):
        run(tokenizer, scribe, tmp_path, settings, SEEDS[:4])
    assert len(scribe.requests) == asked


def failing(scribe: Scribe, share: float):
    """Writes babble for exactly this share of any run of requests, evenly spread."""
    bad = babble(scribe.end_id)

    def write(request):
        number = len(written)
        written.append(request)
        fails = int((number + 1) * share) > int(number * share)
        return bad(request) if fails else scribe.random(request)

    written: list = []
    return write


@cases(
    40,
    share=st.sampled_from([0.05, 0.3, 0.6, 0.9]),
    batch_size=st.sampled_from([1, 5, 32, 48, 72]),
    seeds=st.integers(3, 60),
    passages=st.booleans(),
    rows=st.integers(1, 6),
)
def test_a_prompt_without_valid_answer_costs_a_prompt_not_the_run(
    share, batch_size, seeds, passages, rows, tokenizer, tmp_path_factory
) -> None:
    scribe = Scribe(end_of_turn_id(tokenizer), 30)
    scribe.write = failing(scribe, share)
    settings = replace(
        SETTINGS, num_candidates=1, batch_size=batch_size, num_samples=rows
    )
    kind, words = ("text", " and so on" * 4) if passages else ("prompt", "")
    given = [Seed(kind, text=f"{kind} number {i}{words}") for i in range(seeds)]
    folder = tmp_path_factory.mktemp("store")
    hopeless = share == 0.9
    try:
        result = run(tokenizer, scribe, folder, settings, given)
    except RegenerationError as error:
        assert (
            hopeless and "hopeless" in str(error) and "the same command" in str(error)
        )
        assert len(scribe.requests) < 32 + batch_size
        return
    assert result.input_ids.shape == (rows, settings.sequence_length)
    counts = result.manifest["counts"]
    assert not hopeless or counts["prompts_answered"] < 32 + batch_size
    limit = settings.max_fallback_fraction * counts["prompts_answered"]
    assert counts["prompts_fallback"] <= (limit if passages else 0)
    lost = counts["prompts_dropped"] + counts["prompts_fallback"]
    assert lost <= share * counts["prompts_answered"] < lost + 1
    assert (losses(counts) is None) == (lost == 0)


def test_text_seeds_fall_back_to_themselves(tokenizer, scribe, tmp_path) -> None:
    scribe.write = babble(scribe.end_id)
    settings = replace(SETTINGS, max_fallback_fraction=1.0, num_samples=1)
    seeds = [Seed("text", text=f"a passage number {i}. " * 8) for i in range(8)]
    result = run(tokenizer, scribe, tmp_path, settings, seeds)
    assert result.manifest["counts"]["prompts_fallback"] == 4
    assert "a passage number" in tokenizer.decode(result.input_ids[0])


def test_truncated_answers_get_no_end_of_turn(tokenizer, scribe, tmp_path) -> None:
    def cut(request):
        ids = random.Random(request.seed).sample(range(300, 2000), 40)
        return Draw(ids, False, [-1.0] * 40)

    scribe.write = cut
    result = run(tokenizer, scribe, tmp_path)
    answers = result.input_ids[result.loss_mask.bool()]
    assert scribe.end_id not in answers.tolist()
    assert result.manifest["counts"]["selected_truncated"] > 0
    strict = replace(SETTINGS, gates=GateLimits(4, accept_truncated=False))
    with pytest.raises(RegenerationError, match="truncated"):
        run(tokenizer, scribe, tmp_path, strict)


def test_a_prompt_longer_than_the_context_is_left_out(
    tokenizer, scribe, tmp_path
) -> None:
    seeds = [*SEEDS, Seed("prompt", text="long " * 300)]
    settings = replace(SETTINGS, batch_size=11, num_samples=8)
    result = run(tokenizer, scribe, tmp_path, settings, seeds, context_length=200)
    assert result.manifest["counts"]["prompts_too_long"] == 1


def test_only_prompts_that_are_too_long_are_named_as_such(
    tokenizer, scribe, tmp_path
) -> None:
    seeds = [Seed("prompt", text=f"{i} long " * 300) for i in range(5)]
    with pytest.raises(RegenerationError, match="all 5 prompts are too long"):
        run(tokenizer, scribe, tmp_path, seeds=seeds, context_length=200)


def test_seeds_that_stand_in_are_no_yield(tokenizer, scribe, tmp_path) -> None:
    scribe.write = babble(scribe.end_id)
    settings = replace(SETTINGS, max_fallback_fraction=1.0, num_samples=64)
    seeds = [Seed("text", text=f"a passage number {i}. " * 8) for i in range(40)]
    with pytest.raises(RegenerationError, match="hopeless"):
        run(tokenizer, scribe, tmp_path, settings, seeds)


def test_no_more_prompts_are_answered_than_needed(tokenizer, scribe, tmp_path) -> None:
    settings = replace(SETTINGS, num_candidates=1, batch_size=64, num_samples=40)
    seeds = [Seed("prompt", text=f"prompt number {i}") for i in range(300)]
    result = run(tokenizer, scribe, tmp_path, settings, seeds)
    counts = result.manifest["counts"]
    needed = settings.token_budget / (counts["tokens_selected"] / counts["selected"])
    assert needed <= counts["prompts_answered"] < needed + 10


def test_a_base_model_continues_text(small_model, scribe, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = None
    seeds = [Seed("text", text=f"{i} was the number of a long passage") for i in "abcd"]
    talk = conversation(tokenizer, source(tokenizer, scribe), SETTINGS)
    assert prepare(Task(seeds[0]), [], talk).target_ids == encode(
        tokenizer, seeds[0].text
    )
    run(tokenizer, scribe, tmp_path, seeds=seeds)


def test_templates_of_thinking_siblings_are_reconciled(small_model, scribe) -> None:
    target = AutoTokenizer.from_pretrained(small_model)
    thinker = AutoTokenizer.from_pretrained(small_model)
    thinker.chat_template = target.chat_template.replace(
        "assistant\\n'", "assistant\\n<think>\\n'"
    )
    assert thinker.chat_template != target.chat_template
    talk = conversation(target, source(thinker, scribe), SETTINGS)
    prompt = prepare(Task(SEEDS[0]), [], talk)
    assert prompt.inside_thinking and not talk.wrapping.reasoning
    assert prompt.target_ids + prompt.primed == prompt.generator_ids
    assert "step by step" not in target.decode(prompt.target_ids)


def test_the_thinking_switch_follows_chain_of_thought(small_model, scribe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template += (
        "{%- if enable_thinking is defined and not enable_thinking %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    )
    thinker = source(tokenizer, scribe)
    assert conversation(tokenizer, thinker, SETTINGS).enable_thinking is True
    plain = replace(SETTINGS, chain_of_thought=False)
    talk = conversation(tokenizer, thinker, plain)
    assert talk.enable_thinking is False
    text = tokenizer.decode(prepare(Task(SEEDS[0]), [], talk).target_ids)
    assert text.endswith("<think>\n\n</think>\n\n")
    forced = replace(SETTINGS, enable_thinking=False, chain_of_thought=True)
    talk = conversation(tokenizer, thinker, forced)
    assert talk.enable_thinking is False and talk.wrapping.reasoning


def test_reasoning_is_asked_for_in_words_only_where_told(tokenizer, scribe) -> None:
    def asked(chain_of_thought: bool | None) -> bool:
        settings = replace(SETTINGS, chain_of_thought=chain_of_thought)
        return conversation(
            tokenizer, source(tokenizer, scribe), settings
        ).wrapping.reasoning

    assert [asked(choice) for choice in (None, False, True)] == [False, False, True]


def test_batches_do_not_depend_on_seed_order() -> None:
    def first(seeds):
        return next(batches(seeds, SETTINGS, lambda: 8))

    assert first(SEEDS) == first(SEEDS[::-1])
    assert len(first(SEEDS)) == 4
    assert first(SEEDS) != next(batches(SEEDS, replace(SETTINGS, seed=1), lambda: 8))


def test_sampling_prefers_given_then_own_then_default(tokenizer, scribe) -> None:
    own = GenerationConfig(temperature=0.3, top_k=7)
    resolved = resolve_sampling(source(tokenizer, scribe, defaults=own), 9, top_k=3)
    assert resolved == Sampling(0.3, 0.8, 3, 9)
