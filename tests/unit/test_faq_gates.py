"""Gates, competition and packing: plain functions on ids and text."""

from dataclasses import replace

import pytest
import torch
from generated import cases
from hypothesis import strategies as st
from scribe import SETTINGS

from llmc_faq_slider.faq.choice import pack, ranked
from llmc_faq_slider.faq.competition import Entrant, Group
from llmc_faq_slider.faq.gates import (
    failed_gate,
    normalised,
    repeated_share,
    think_balanced,
    zlib_ratio,
)
from llmc_faq_slider.faq.preparation import Task, Turn
from llmc_faq_slider.faq.rendering import Sample, render
from llmc_faq_slider.faq.seeds import Seed
from llmc_faq_slider.faq.settings import GateLimits

pytestmark = pytest.mark.unit

VARIED = list(range(100, 140))


def gate(ids=VARIED, text="a good answer", truncated=False, **limits):
    return failed_gate(ids, text, truncated, {0, 1, 2}, GateLimits(**limits))


def test_a_plain_answer_passes() -> None:
    assert gate() is None


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ({"ids": VARIED[:31]}, "too_short"),
        ({"ids": [*VARIED, 1, 7]}, "control_token"),
        ({"ids": [5, 6, 7, 8, 9, 10, 11, 12] * 6}, "repetitive"),
        ({"text": "never closed <think> so"}, "think_unbalanced"),
        ({"text": "tick tock " * 400}, "compressible"),
        ({"truncated": True, "accept_truncated": False}, "truncated"),
    ],
)
def test_each_gate_names_itself(case, name) -> None:
    assert gate(**case) == name


@pytest.mark.parametrize(
    ("text", "truncated", "balanced"),
    [
        ("no tags", False, True),
        ("<think>a</think>b", False, True),
        ("</think>b<think>", False, False),
        ("a</think>b", False, False),
        ("<think>a<think>b</think>", False, False),
        ("<think>cut off", True, True),
        ("</think>", True, False),
    ],
)
def test_think_tags(text, truncated, balanced) -> None:
    assert think_balanced(text, truncated) is balanced


def test_short_texts_have_no_zlib_ratio() -> None:
    assert zlib_ratio("a" * 999) == 0
    assert zlib_ratio("a" * 1000) > 4


def test_repeated_share_counts_second_occurrences_only() -> None:
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share(list(range(50))) == 0
    # 16 tokens of period 8 give 9 runs, of which only the last repeats the first
    assert repeated_share(list(range(8)) * 2) == pytest.approx(1 / 9)


def test_duplicates_ignore_case_and_space() -> None:
    assert normalised("A  b\nC") == normalised("a b c")


TASK = Task(Seed("prompt", text="what?"))


def entrant(index, tokens=10, whole=True) -> Entrant:
    return Entrant(index, [Turn(None, None, [7] * tokens, "")], whole, [])


def order(entrants, scores=None, **settings) -> list[int]:
    """Candidate numbers, the winner first."""
    told = {(TASK.id, index): score for index, score in (scores or {}).items()}
    group = ranked(Group(TASK, entrants), told, replace(SETTINGS, **settings))
    return [one.index for one in group]


@pytest.mark.parametrize("selector", ["expert_nll", "expert_judge"])
def test_the_highest_score_wins(selector) -> None:
    group = [entrant(0), entrant(1), entrant(2)]
    scores = {0: -2.0, 1: -1.0, 2: -5.0}
    assert order(group, scores, selector=selector) == [1, 0, 2]


def test_a_finished_answer_beats_a_likelier_truncated_one() -> None:
    group = [entrant(0, whole=False), entrant(1)]
    assert order(group, {0: -0.1, 1: -5.0}) == [1, 0]


def test_ties_go_to_the_shorter_then_to_the_lower_number() -> None:
    assert order([entrant(0, 9), entrant(1, 8)]) == [1, 0]
    assert order([entrant(1), entrant(0)]) == [0, 1]


def test_chance_decides_the_same_in_any_order() -> None:
    group = [entrant(i, tokens=10 + i) for i in range(8)]
    chosen = {order(group, selector="random", seed=seed)[0] for seed in range(40)}
    assert len(chosen) > 3
    again = order(group[::-1], selector="random", seed=5)
    assert order(group, selector="random", seed=5) == again


def test_render_closes_a_turn_once_and_masks_the_prompt() -> None:
    sample = render([1, 5], [7, 8], 2)
    assert sample == Sample([1, 5, 7, 8, 2], [0, 0, 1, 1, 1])
    assert render([1], [7], None) == Sample([1, 7], [0, 1])


@cases(
    100,
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    row_length=st.integers(1, 16),
    seed=st.integers(0, 5),
)
def test_packing_keeps_order_inside_samples(lengths, row_length, seed) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    samples = [
        Sample(list(range(start, start + n)), [1] * n)
        for start, n in zip(starts, lengths, strict=True)
    ]
    rows = sum(lengths) // row_length
    if rows == 0:
        return
    ids, mask = pack(samples, rows, row_length, seed)
    assert ids.shape == mask.shape == (rows, row_length)
    assert ids.dtype == torch.int32 and mask.dtype == torch.uint8
    stream = ids.reshape(-1).tolist()
    assert len(set(stream)) == len(stream)
    breaks = sum(b != a + 1 for a, b in zip(stream, stream[1:], strict=False))
    assert breaks < len(lengths)


def test_packing_is_seeded_and_refuses_too_few_tokens() -> None:
    samples = [Sample([i] * 4, [1] * 4) for i in range(30)]
    assert torch.equal(pack(samples, 5, 8, 1)[0], pack(samples, 5, 8, 1)[0])
    assert not torch.equal(pack(samples, 5, 8, 1)[0], pack(samples, 5, 8, 2)[0])
    with pytest.raises(ValueError, match="needs 128 tokens, the samples hold 120"):
        pack(samples, 16, 8, 0)
