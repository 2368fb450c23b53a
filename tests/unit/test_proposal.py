"""The rule that proposes numbers of growing and shrinking windows."""

import math

import pytest
from generated import cases
from hypothesis import strategies as st

from llmc_faq_slider.slider.proposal import propose_windows

pytestmark = pytest.mark.unit

values = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=80)


def counts(measured):
    proposal = propose_windows(measured)
    return proposal.shallow_layers, proposal.deep_layers


@cases(500, values)
def test_the_proposed_layers_are_the_unbroken_run_above_the_threshold(measured):
    proposal = propose_windows(measured)
    at_most = max(1, len(measured) // 3)
    for run, count in (
        (measured, proposal.shallow_layers),
        (measured[::-1], proposal.deep_layers),
    ):
        assert 1 <= count <= at_most
        if count > 1:
            assert min(run[:count]) > proposal.threshold
        if run[0] > proposal.threshold and count < at_most:
            assert run[count] <= proposal.threshold


@cases(100, values)
def test_the_rule_is_the_same_from_both_ends(measured):
    assert counts(measured[::-1]) == counts(measured)[::-1]


@cases(100, values, st.integers(-10, 10))
def test_the_unit_does_not_matter(measured, power):
    # A power of two scales every number without rounding.
    assert counts([value * 2.0**power for value in measured]) == counts(measured)


@cases(
    300,
    num_layers=st.integers(3, 100),
    ends=st.tuples(st.integers(0, 33), st.integers(0, 33)),
    level=st.floats(1e-4, 1e2),
    data=st.data(),
)
def test_ends_that_stand_out_are_found(num_layers, ends, level, data):
    shallow, deep = (min(end, num_layers // 3) for end in ends)
    quiet = st.floats(0.95 * level, 1.05 * level)
    loud = st.floats(2 * level, 100 * level)
    measured = [
        data.draw(loud if i < shallow or i >= num_layers - deep else quiet)
        for i in range(num_layers)
    ]
    assert counts(measured) == (max(1, shallow), max(1, deep))


@cases(100, st.integers(1, 100), st.floats(0, 10))
def test_equal_layers_give_one_of_each(num_layers, value):
    assert counts([value] * num_layers) == (1, 1)


@cases(100, st.permutations(range(6)))
def test_only_the_ends_have_an_order(order):
    middle = [1.0, 1.1, 0.9, 5.0, 1.2, 0.8]
    measured = [9, 7, 1, 9, 1, 1] + [middle[i] for i in order] + [1, 1, 1, 1, 8, 9]
    assert counts(measured) == (2, 2)


def test_threshold_by_hand():
    """Nine layers: the middle is 2, 4, 3, its median 3, its deviation 1."""
    proposal = propose_windows([9, 8, 7, 2, 4, 3, 8, 7.4, 7.5])
    assert proposal.typical == 3
    assert proposal.threshold == pytest.approx(3 + 3 * 1.4826)
    assert (proposal.shallow_layers, proposal.deep_layers) == (2, 1)


@pytest.mark.parametrize("measured", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_nothing_is_proposed_without_numbers(measured):
    with pytest.raises(ValueError, match="needs"):
        propose_windows(measured)
