"""Gates, competition and packing: plain functions on ids and text."""

import pytest
import torch
from generated import cases
from hypothesis import strategies as st

from llmc_faq_slider.faq.content_gates import normalised
from llmc_faq_slider.faq.gates import (
    failed_gate,
    repeated_share,
    think_balanced,
    zlib_ratio,
)
from llmc_faq_slider.faq.packing import pack
from llmc_faq_slider.faq.rendering import Sample, render
from llmc_faq_slider.faq.selection import Contender, ranked
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


def winner(group, selector, seed) -> Contender:
    return ranked(group, selector, seed)[0]


def contender(index, tokens=10, truncated=False, score=0.0) -> Contender:
    return Contender("p", index, tokens, truncated, score)


def test_the_expert_prefers_the_likelier_answer() -> None:
    group = [contender(0, score=-2.0), contender(1, score=-1.0)]
    assert winner(group, "expert_nll", 0).index == 1


def test_a_finished_answer_beats_a_likelier_truncated_one() -> None:
    group = [contender(0, truncated=True, score=-0.1), contender(1, score=-5.0)]
    assert winner(group, "expert_nll", 0).index == 1


def test_ties_go_to_the_shorter_then_to_the_lower_number() -> None:
    assert winner([contender(0, 9), contender(1, 8)], "expert_nll", 0).index == 1
    assert winner([contender(1), contender(0)], "expert_nll", 0).index == 0


def test_chance_decides_the_same_in_any_order() -> None:
    group = [contender(i, tokens=10 + i) for i in range(8)]
    chosen = {winner(group, "random", seed).index for seed in range(40)}
    assert len(chosen) > 3
    assert winner(group, "random", 5) == winner(group[::-1], "random", 5)


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
