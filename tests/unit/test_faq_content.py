"""Gates that read what answers say, and the choice of samples."""

from collections import Counter

import pytest
from generated import cases
from hypothesis import strategies as st

from llmc_faq_slider.faq.choice import Pick, choose
from llmc_faq_slider.faq.competition import Group
from llmc_faq_slider.faq.gates import Evaluation, Seen, is_refusal
from llmc_faq_slider.faq.preparation import Task
from llmc_faq_slider.faq.rendering import Sample, join
from llmc_faq_slider.faq.seeds import Seed

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that request.", True),
        ("As an AI, I have no opinion.", True),
        ("<think>\nis it safe?\n</think>\n\nI cannot provide that.", True),
        ("抱歉，我不能回答。", True),
        ("The king said he was sorry.", False),
        ("I can help you with that. I'm glad you asked.", False),
        ("Here is a letter.\n\n" + "Dear Sir, " * 40 + "I'm sorry.", False),
    ],
)
def test_refusals(text, refuses) -> None:
    assert is_refusal(text) is refuses


def test_overlap_is_a_run_of_thirteen_words() -> None:
    words = [f"word{i}" for i in range(20)]
    evaluation = Evaluation([" ".join(words)])
    assert evaluation.overlaps("so: " + ", ".join(words[3:16]).upper())
    assert not evaluation.overlaps(" ".join(words[3:15]))
    assert not Evaluation([]).overlaps(" ".join(words))


def test_near_duplicates_count_across_prompts_only() -> None:
    seen = Seen(0.8)
    ids = list(range(100))
    seen.add("a", "first", ids)
    close = [*ids[:98], 7, 8]
    assert seen.failed("a", "other", close) is None
    assert seen.failed("b", "other", close) == "near_duplicate"
    assert seen.failed("b", " FIRST ", [1, 2, 3]) == "duplicate"
    assert seen.failed("b", "other", [*ids[:60], *range(500, 540)]) is None


@cases(
    100,
    st.lists(st.integers(0, 5), min_size=6, max_size=60),
    st.lists(st.integers(0, 5), min_size=6, max_size=60),
)
def test_similarity_is_the_jaccard_index(first, second) -> None:
    def runs(ids):
        return {tuple(ids[i : i + 5]) for i in range(len(ids) - 4)}

    shared = len(runs(first) & runs(second)) / len(runs(first) | runs(second))
    seen = Seen(0.5)
    seen.add("a", "x", first)
    assert (seen.failed("b", "y", second) == "near_duplicate") is (shared > 0.5)


def pick(source, number, place=0, size=10) -> Pick:
    seed = Seed("prompt", text=f"{source} {number}", source=source)
    sample = Sample([number] * size, [1] * size)
    return Pick(Group(Task(seed), []), 0, place, [sample], False, None, [])


def shares(picks) -> Counter:
    return Counter(p.group.task.seed.source for p in picks)


def test_sources_keep_their_proportion_when_gates_hit_one_harder() -> None:
    # 40 prompts of each source asked; b lost three quarters of its groups
    queued = [[pick("a", i), pick("a", i, 1)] for i in range(40)]
    queued += [[pick("b", i), pick("b", i, 1), pick("b", i, 2)] for i in range(10)]
    chosen = choose(queued, Counter(a=40, b=40), 400)
    assert shares(chosen) == Counter(a=20, b=20)
    of_b = [p.place for p in chosen if p.group.task.seed.source == "b"]
    assert of_b == [0] * 10 + [1] * 10


def test_second_places_fill_what_short_winners_leave_open() -> None:
    queued = [[pick("a", i, 0, 5), pick("a", i, 1, 20)] for i in range(10)]
    chosen = choose(queued, Counter(a=10), 100)
    assert [p.place for p in chosen] == [0] * 10 + [1] * 3


def test_turns_join_only_when_the_ids_go_on() -> None:
    first = Sample([1, 2, 3], [0, 1, 1])
    assert join(first, Sample([1, 2, 3, 4, 5], [0, 0, 0, 0, 1])) == Sample(
        [1, 2, 3, 4, 5], [0, 1, 1, 0, 1]
    )
    assert join(first, Sample([1, 2, 9, 4], [0, 0, 0, 1])) is None
