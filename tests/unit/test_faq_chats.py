"""Chats turn by turn, tries again, experts and counts, with a scripted generator."""

import json
import random
import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from scribe import SETTINGS as SCRIPTED
from scribe import Scribe, source
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_faq_slider.faq import judging
from llmc_faq_slider.faq.competition import RegenerationError
from llmc_faq_slider.faq.experts import ExpertSource, TransformersExpert, loaded_expert
from llmc_faq_slider.faq.gates import GATES
from llmc_faq_slider.faq.generators import sibling_source
from llmc_faq_slider.faq.grading import Experts
from llmc_faq_slider.faq.identity import FamilyError
from llmc_faq_slider.faq.regenerate import regenerate
from llmc_faq_slider.faq.rendering import end_of_turn_id
from llmc_faq_slider.faq.sampling import Draw
from llmc_faq_slider.faq.seeds import Seed
from llmc_faq_slider.faq.settings import GateLimits
from llmc_faq_slider.faq.store import Store

pytestmark = pytest.mark.unit

SETTINGS = replace(SCRIPTED, chain_of_thought=False)
CHATS = [
    Seed(
        "messages",
        messages=(
            ("system", "be brief"),
            ("user", f"first {i}"),
            ("assistant", "an old answer"),
            ("user", f"second {i}"),
            ("assistant", "another old answer"),
        ),
    )
    for i in range(8)
]
PROMPTS = [Seed("prompt", text=f"question {i}") for i in range(10)]


@pytest.fixture
def scribe(tokenizer):
    return Scribe(end_of_turn_id(tokenizer), 20)


def run(
    tokenizer,
    scribe,
    folder,
    settings=SETTINGS,
    seeds=PROMPTS,
    independent=False,
    **more,
):
    writer = source(tokenizer, scribe, independent=independent)
    return regenerate(seeds, tokenizer, writer, settings, Store(folder), **more)


def records(result):
    lines = (result.folder / "messages.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("independent", [False, True])
def test_each_turn_answers_the_generators_own_earlier_ones(
    tokenizer, scribe, tmp_path, independent
) -> None:
    result = run(tokenizer, scribe, tmp_path, seeds=CHATS, independent=independent)
    second = [r for r in scribe.requests if len(r.messages) == 3]
    assert len(second) == len(scribe.requests) / 2
    written = {
        tokenizer.decode(scribe.random(r).ids[:-1])
        for r in scribe.requests
        if len(r.messages) == 1
    }
    before = [
        [*r.ids, *scribe.random(r).ids[:-1]]
        for r in scribe.requests
        if len(r.messages) == 1
    ]
    for request in second:
        assert request.messages[1]["content"] in written
        # the very ids that were drawn, which their text would not give again
        assert any(request.ids[: len(ids)] == ids for ids in before)
        assert "old answer" not in tokenizer.decode(request.ids)
    for record in records(result):
        assert [m["role"] for m in record["messages"]] == [
            *("user", "assistant", "user", "assistant")
        ]
    # the second turn goes on from the first one's ids, so a chat is one sample
    texts = [r["text"] for r in records(result)]
    assert all(text.count("<|im_start|>assistant") == 2 for text in texts)


def test_a_chat_ends_with_an_answer_that_was_cut_off(
    tokenizer, scribe, tmp_path
) -> None:
    def cut(request):
        draw = scribe.random(request)
        open_end = Draw(draw.ids[:-1], False, draw.logprobs[:-1])
        return draw if request.seed % 2 else open_end

    scribe.write = cut
    result = run(tokenizer, scribe, tmp_path, seeds=CHATS)
    finished = sum(cut(r).finished for r in scribe.requests if len(r.messages) == 1)
    assert len([r for r in scribe.requests if len(r.messages) == 3]) == finished
    assert result.manifest["counts"]["candidates_truncated"] > 0


def thinking_tokenizer(small_model):
    """A template that hides the thoughts of all answers but the last, like Qwen3's."""
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
        "{%- if m.role == 'assistant' %}{{- m.content.split('</think>')[-1].strip() }}"
        "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and not enable_thinking %}"
        "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
    )
    return tokenizer


def test_thinking_models_get_a_sample_per_turn(small_model, scribe, tmp_path) -> None:
    tokenizer = thinking_tokenizer(small_model)

    def think(request):
        thought = tokenizer("<think>\nhm, let me see\n</think>\n\n")["input_ids"]
        draw = scribe.random(request)
        return replace(draw, ids=[*thought, *draw.ids], logprobs=[])

    scribe.write = think
    settings = replace(SETTINGS, selector="random", enable_thinking=True)
    result = run(tokenizer, scribe, tmp_path, settings, CHATS)
    second = next(r for r in scribe.requests if len(r.messages) == 3)
    assert "</think>" in second.messages[1]["content"]
    assert "hm, let me see" not in tokenizer.decode(second.ids)
    assert second.enable_thinking is True
    for record in records(result):
        # a sample per turn, each with its own thought in front of its answer
        assert record["text"].count("<think>\nhm, let me see\n</think>") == 2
        assert record["text"].count("user\nbe brief") == 2
        assert "system" not in record["text"]


def test_a_thought_that_was_cut_off_is_a_cut_off_answer(
    small_model, scribe, tmp_path
) -> None:
    tokenizer = thinking_tokenizer(small_model)

    def think(request):
        thought = tokenizer("<think>\nhm, let me see")["input_ids"]
        return Draw([*thought, *scribe.random(request).ids[:-1]], False, [])

    scribe.write = think
    settings = replace(SETTINGS, selector="random", enable_thinking=True)
    result = run(tokenizer, scribe, tmp_path, settings)
    counts = result.manifest["counts"]
    assert counts["selected_truncated"] == counts["selected"] > 0
    assert scribe.end_id not in result.input_ids[result.loss_mask.bool()].tolist()
    scribe.write = lambda request: replace(think(request), finished=True)
    with pytest.raises(RegenerationError, match="think_unbalanced"):
        run(tokenizer, scribe, tmp_path / "closed", settings)


def test_prompts_without_valid_answer_are_tried_again(
    tokenizer, scribe, tmp_path
) -> None:
    first = {}

    def poor(request):
        asked = tuple(request.ids)
        tries = first.setdefault(asked, [])
        tries.append(request.seed)
        good = "question 3" not in tokenizer.decode(request.ids) or len(tries) > 2
        return scribe.random(request) if good else Draw([7] * 20, False, [-1.0] * 20)

    scribe.write = poor
    settings = replace(SETTINGS, retries=1, num_samples=5, batch_size=10)
    result = run(tokenizer, scribe, tmp_path, settings)
    counts = result.manifest["counts"]
    assert counts["prompts_retried"] == 1 and counts["prompts_dropped"] == 0
    assert result.manifest["gates"]["repetitive"] == 2
    (tries,) = [seeds for seeds in first.values() if len(seeds) == 4]
    assert len(set(tries)) == 4
    assert set(scribe.limits) == {40, 80}
    # all of it is stored
    asked = len(scribe.requests)
    run(tokenizer, scribe, tmp_path, replace(settings, selector="random"))
    assert len(scribe.requests) == asked


def test_fallbacks_beyond_the_limit_are_replaced(tokenizer, scribe, tmp_path) -> None:
    seeds = [Seed("text", text=f"a passage number {i}. " * 8) for i in range(20)]

    def poor(request):
        fails = int(re.search(r"number (\d+)", tokenizer.decode(request.ids))[1]) < 4
        return Draw([7] * 20, False, [-1.0]) if fails else scribe.random(request)

    scribe.write = poor
    settings = replace(SETTINGS, batch_size=20, retries=1, num_samples=5)
    result = run(tokenizer, scribe, tmp_path, settings, seeds)
    counts = result.manifest["counts"]
    assert counts["prompts_fallback"] + counts["prompts_dropped"] == 4
    assert counts["prompts_fallback"] <= 2
    allowed = replace(settings, max_fallback_fraction=0.2)
    result = run(tokenizer, scribe, tmp_path, allowed, seeds)
    assert result.manifest["counts"]["prompts_fallback"] == 4


def test_every_gate_is_counted(tokenizer, scribe, tmp_path) -> None:
    text = "the cat sat on the mat and looked at the dog across the long road"
    said = {
        "question 0": "I'm sorry, but I can't help with that request, my friend.",
        "question 1": f"{text} today",
    }

    def write(request):
        asked = tokenizer.decode(request.ids)
        for key, answer in said.items():
            if key in asked and "question 1" in key:
                ids = tokenizer(answer + f" {request.seed}")["input_ids"]
                return Draw([*ids, scribe.end_id], True, [])
            if key in asked:
                return Draw([*tokenizer(answer)["input_ids"], scribe.end_id], True, [])
        return scribe.random(request)

    scribe.write = write
    settings = replace(
        SETTINGS,
        selector="random",
        max_fallback_fraction=1.0,
        num_samples=4,
        batch_size=10,
    )
    evaluation = [Seed("text", text=text)]
    result = run(tokenizer, scribe, tmp_path, settings, evaluation=evaluation)
    gates = result.manifest["gates"]
    assert set(gates) == set(GATES)
    assert gates["refusal"] == 2 and gates["evaluation_overlap"] == 2
    allowed = replace(settings, gates=GateLimits(4, allow_refusals=True))
    again = run(tokenizer, scribe, tmp_path, allowed)
    assert again.manifest["gates"]["refusal"] == 0
    assert again.manifest["gates"]["duplicate"] == 1


def test_seeds_of_the_evaluation_set_are_left_out(tokenizer, scribe, tmp_path) -> None:
    text = " ".join(f"w{i}" for i in range(15))
    seeds = [*PROMPTS, Seed("prompt", text=f"so {text}")]
    evaluation = [Seed("text", text=text)]
    result = run(tokenizer, scribe, tmp_path, seeds=seeds, evaluation=evaluation)
    assert result.manifest["counts"]["seeds_overlapping"] == 1
    assert not any("w3 w4" in tokenizer.decode(r.ids) for r in scribe.requests)
    with pytest.raises(RegenerationError, match="all 1 seeds share"):
        run(tokenizer, scribe, tmp_path, seeds=seeds[-1:], evaluation=evaluation)


def test_no_selector_needs_more_answers_than_another(
    tokenizer, scribe, tmp_path
) -> None:
    def uneven(request):
        draw = random.Random(request.seed)
        ids = [draw.randrange(300, 2000) for _ in range(draw.randrange(5, 38))]
        return Draw([*ids, scribe.end_id], True, [-len(ids) / 40] * (len(ids) + 1))

    scribe.write = uneven
    settings = replace(SETTINGS, num_candidates=4, num_samples=10)
    run(tokenizer, scribe, tmp_path, replace(settings, selector="random"))
    asked = len(scribe.requests)
    # this generator finds short answers likelier
    result = run(tokenizer, scribe, tmp_path, settings)
    assert len(scribe.requests) == asked
    assert result.input_ids.shape == (10, 64)


class Judge:
    """Grades an answer by a rule; can babble and can prefer the first place."""

    def __init__(self, rule, babble=0):
        self.rule, self.babble = rule, babble
        self.asked = []

    def replies(self, chats, schema, max_new_tokens, pattern=None):
        return [self._reply(chat, schema) for chat in chats]

    def _reply(self, chat, schema):
        self.asked.append(chat[0]["content"])
        if len(self.asked) <= self.babble:
            return 'Sure! {"scores": {}}'
        shown = re.findall(
            r"<answer (\w)>\n(.*?)\n</answer \1>", self.asked[-1], re.DOTALL
        )
        assert [x for x, _ in shown] == schema["properties"]["scores"]["required"]
        grades = {
            letter: [min(10, self.rule(text) + 2 * (place == 0))] * 4
            for place, (letter, text) in enumerate(shown)
        }
        return json.dumps({"scores": grades})

    @contextmanager
    def open(self):
        yield self


def judged(tokenizer, scribe, folder, judge, **changes):
    settings = replace(SETTINGS, selector="expert_judge", num_candidates=3, **changes)
    experts = Experts(ExpertSource({"kind": "judge"}, judge.open), False)
    return run(tokenizer, scribe, folder, settings, experts=experts)


def test_the_judges_favourite_wins_whatever_its_place(
    tokenizer, scribe, tmp_path
) -> None:
    judge = Judge(lambda text: sum(map(ord, text)) % 9)
    result = judged(tokenizer, scribe, tmp_path, judge)
    groups = {}
    for line in next(tmp_path.glob("candidates/*/candidates.jsonl")).open():
        candidate = json.loads(line)
        text = tokenizer.decode(candidate["ids"][:-1])
        groups.setdefault(candidate["prompt_id"], []).append(judge.rule(text))
    for winner in result.manifest["winners"]:
        if winner["place"] == 0:
            grades = groups[winner["task"]]
            assert grades[winner["candidate"]] == max(grades)
    assert len(judge.asked) == 2 * len(groups)
    asked = len(judge.asked)
    judged(tokenizer, scribe, tmp_path, judge, num_samples=3)
    assert len(judge.asked) == asked


def test_an_unreadable_judge_is_asked_twice_and_then_counted(
    tokenizer, scribe, tmp_path
) -> None:
    judge = Judge(lambda text: 5, babble=10**9)
    result = judged(tokenizer, scribe, tmp_path, judge)
    groups = result.manifest["counts"]["prompts_answered"]
    assert result.manifest["counts"]["groups_unjudged"] == groups
    assert len(judge.asked) == 4 * groups
    by_score = run(
        tokenizer,
        scribe,
        tmp_path,
        replace(SETTINGS, selector="expert_nll", num_candidates=3),
    )
    assert torch.equal(result.input_ids, by_score.input_ids)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no",
        "[]",
        '{"scores": {"A": [1, 2, 3, 4]}}',
        '{"scores": {"A": [1, 2, 3, 4], "B": [1, 2, 3]}}',
        '{"scores": {"A": [1, 2, 3, 4], "B": [1, 2, 3, 11]}}',
        '{"scores": {"A": [1, 2, 3, 4], "B": [1, 2, 3, "4"]}}',
        '{"scores": {"A": [1, 2, 3, 4], "B": [1, 2, 3, 4], "C": [1, 2, 3, 4]}}',
        '{"scores": {"A": [1, 2, 3, 4], "B": [1, 2, 3, 4]}, "best": "A"}',
        'Here: {"scores": {"A": [1, 2, 3, 4], "B": [1, 2, 3, 4]}}',
        "[" * 100_000,
    ],
)
def test_only_the_json_that_was_asked_for_counts(reply) -> None:
    assert judging.verdict(reply, [0, 1]) is None


def test_what_fits_the_pattern_is_a_verdict() -> None:
    reply = '{"scores": {"A": [1, 10, 3, 0], "B": [0, 0, 0, 4]}}'
    assert re.fullmatch(judging.pattern(2), reply)
    assert judging.verdict(reply, [0, 1]) == [14, 4]
    assert not re.fullmatch(judging.pattern(2), reply.replace("10", "11"))


def test_verdicts_are_put_back_in_order_and_averaged() -> None:
    reply = '{"scores": {"A": [1, 1, 1, 1], "B": [9, 9, 9, 9]}}'
    assert judging.verdict(reply, [1, 0]) == [36, 4]
    assert judging.average([[36, 4], None]) == [36.0, 4.0]
    assert judging.average([[36, 4], [30, 10]]) == [33.0, 7.0]
    assert judging.average([None, None]) is None
    first, second = judging.orders("group", 4, 0)
    assert first == second[::-1] and sorted(first) == [0, 1, 2, 3]


def test_markers_in_an_answer_do_not_break_the_judges_prompt() -> None:
    asked = judging.question("q {x}", ["{answers} </answer A>", "b"], [0, 1])
    assert "{answers}" in asked["content"] and '"B": [0, 0, 0, 0]' in asked["content"]


@pytest.fixture(scope="module")
def small(small_model):
    dtype = torch.float32
    return AutoModelForCausalLM.from_pretrained(small_model, dtype=dtype).eval()


@contextmanager
def already(model):
    yield model


def test_an_expert_takes_what_it_finds_likeliest(
    tokenizer, scribe, tmp_path, small
) -> None:
    target = loaded_expert(lambda: already(small), tokenizer, "w")
    asked = Experts(target, False)
    settings = replace(SETTINGS, num_candidates=3)
    result = run(tokenizer, scribe, tmp_path, settings, experts=asked)
    by_request = {}
    for request in scribe.requests:
        by_request.setdefault(tuple(request.ids), []).append(scribe.random(request).ids)
    expert = TransformersExpert(small, tokenizer)
    best = set()
    for prompt, answers in by_request.items():
        scores = expert.mean_logprobs([list(prompt)] * 3, answers)
        best.add(tuple(answers[scores.index(max(scores))]))
    winners = [r["messages"][-1]["content"] for r in records(result)]
    texts = {tokenizer.decode(ids[:-1]) for ids in best}
    firsts = [w["place"] == 0 for w in result.manifest["winners"]]
    assert [text in texts for text in winners] == firsts
    # scores are stored: no model is needed any more
    broken = ExpertSource(target.identity, lambda: 1 / 0)
    fewer = replace(settings, num_samples=3)
    run(tokenizer, scribe, tmp_path, fewer, experts=Experts(broken, False))


def test_a_generator_that_tells_no_scores_needs_an_expert(
    tokenizer, scribe, tmp_path, small
) -> None:
    scribe.write = lambda request: replace(scribe.random(request), logprobs=[])
    with pytest.raises(RegenerationError, match="needs an expert"):
        run(tokenizer, scribe, tmp_path)
    expert = loaded_expert(lambda: already(small), tokenizer, "w")
    result = run(tokenizer, scribe, tmp_path, experts=Experts(expert, True))
    assert result.manifest["counts"]["selected"] > 0


def other_family(large_model, folder):
    """The large model under a tokenizer whose ids are shifted by added tokens."""
    AutoModelForCausalLM.from_pretrained(large_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(large_model)
    tokenizer.add_tokens(["<brand-new>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_another_tokenizer_is_taken_if_allowed(
    tokenizer, small, large_model, tmp_path
) -> None:
    name = str(other_family(large_model, tmp_path / "other"))
    with pytest.raises(FamilyError, match="vocabulary"):
        sibling_source(name, small.config, tokenizer, 1)
    source = sibling_source(name, small.config, tokenizer, 1, allow_retokenize=True)
    assert not source.shares_tokens
    settings = replace(
        SETTINGS,
        num_samples=2,
        gates=GateLimits(1, 1000.0, 1.0, max_similarity=1.0),
        max_fallback_fraction=1.0,
    )
    result = regenerate(PROMPTS, tokenizer, source, settings, Store(tmp_path / "s"))
    counts = result.manifest["counts"]
    assert counts["candidates_retokenized"] == counts["candidates"] > 0
    assert result.input_ids.max() < len(tokenizer)
