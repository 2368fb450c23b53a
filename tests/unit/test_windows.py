"""The window schedule, for every model depth and setting."""

import pytest
from generated import cases
from hypothesis import strategies as st

from llmc_faq_slider.slider.windows import visit_numbers, window_schedule

pytestmark = pytest.mark.unit

sizes = st.integers(1, 8).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(1, size))
)


def visits(windows, num_layers):
    return [sum(layer in w.layers for w in windows) for layer in range(num_layers)]


@cases(
    500,
    num_layers=st.integers(1, 100),
    shallow=st.integers(0, 12),
    deep=st.integers(0, 12),
    size_and_stride=sizes,
)
def test_every_setting_covers_every_layer_in_order(
    num_layers, shallow, deep, size_and_stride
):
    size, stride = size_and_stride
    windows = window_schedule(num_layers, shallow, deep, size, stride)
    assert min(visits(windows, num_layers)) >= 1
    assert windows[0].start == 0
    assert windows[-1].stop == num_layers
    for before, after in zip(windows, windows[1:], strict=False):
        assert before.start <= after.start
        assert before.start < after.start or before.stop < after.stop
    for window in windows:
        assert 0 <= window.start < window.stop <= num_layers
        if window.family == "fixed":
            assert len(window) <= size


@pytest.mark.parametrize("num_layers", range(1, 101))
def test_defaults_for_every_depth(num_layers):
    windows = window_schedule(num_layers)
    counts = visits(windows, num_layers)
    assert min(counts) >= 1 and windows[-1].stop == num_layers
    if num_layers >= 8:
        # The paper's schedule: L + 1 windows, visited 4, 3, 2, ..., 2, 3, 4 times.
        assert len(windows) == num_layers + 1
        assert counts == [4, 3] + [2] * (num_layers - 4) + [3, 4]
        assert sum(map(len, windows)) == 2 * num_layers + 6


def test_paper_schedule_for_32_layers():
    windows = [str(w) for w in window_schedule(32)]
    assert windows[:6] == [
        "layer 0",
        "layers 0-1",
        "layers 0-2",
        "layers 0-3",
        "layers 3-4",
        "layers 4-5",
    ]
    assert windows[-5:] == [
        "layers 27-28",
        "layers 28-31",
        "layers 29-31",
        "layers 30-31",
        "layer 31",
    ]


def test_windows_of_three_share_two_layers_with_their_neighbours():
    counts = visits(window_schedule(32, window_size=3), 32)
    assert counts == [4] + [3] * 30 + [4]


def test_fixed_windows_only():
    windows = window_schedule(32, shallow_layers=0, deep_layers=0)
    assert len(windows) == 31 and {len(w) for w in windows} == {2}


def test_visits_are_numbered_from_one():
    windows = window_schedule(10)
    assert visit_numbers(windows, 0) == {0: 1}
    assert visit_numbers(windows, 3) == {0: 4, 1: 3, 2: 2, 3: 1}
    last = visit_numbers(windows, len(windows) - 1)
    assert last == {9: visits(windows, 10)[9]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, found 0"),
        ({"num_layers": 4, "window_stride": 3}, "window_stride must lie between 1"),
        ({"num_layers": 4, "window_stride": 0}, "window_stride must lie between 1"),
        ({"num_layers": 4, "deep_layers": -1}, "must not be negative"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        window_schedule(**arguments)
