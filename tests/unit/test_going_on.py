"""Learning and closing stopped between any two steps go on with the same bits."""

import signal

import pytest
import torch
from learning import CPU, LINEARS, rows_of, settings
from test_closing import tuned_linears

from llmc_faq_slider.slider.checkpoint import open_checkpoint
from llmc_faq_slider.slider.closing import ClosingSettings, tune_scales
from llmc_faq_slider.slider.head import OutputHead, frozen
from llmc_faq_slider.slider.interruption import StopRequest, stop_on_signals
from llmc_faq_slider.slider.learner import learn_windows
from llmc_faq_slider.slider.quantizer import ActivationGrid, WeightGrid
from llmc_faq_slider.slider.stream import capture_decoder
from llmc_faq_slider.slider.student import LinearGrids
from llmc_faq_slider.slider.windows import window_schedule

pytestmark = pytest.mark.unit


class StopAtStep(StopRequest):
    """Asks to stop when it was looked at so many times."""

    def __init__(self, steps):
        super().__init__(signal.SIGTERM)
        self.steps = steps

    @property
    def requested(self):
        self.steps -= 1
        return self.steps < 0


def learn(model, saved, stop, **changes):
    layers = list(model.model.layers)
    hidden, calls = capture_decoder(model, layers, rows_of([16, 9, 16, 9]), CPU)
    grids = LinearGrids(WeightGrid(2, True, 16, torch.float32), ActivationGrid(8))
    committed = {}
    learned = learn_windows(
        calls,
        hidden,
        {i: dict.fromkeys(LINEARS, grids) for i in range(len(layers))},
        window_schedule(len(layers), 1, 1),
        settings(batch_size=2, **changes),
        CPU,
        committed.__setitem__,
        saved=saved,
        stop=stop,
    )
    return learned, committed


def assert_same(one, other):
    assert one.keys() == other.keys()
    for index in one:
        for name, linear in one[index].linears.items():
            assert torch.equal(linear.weight, other[index].linears[name].weight)
            assert torch.equal(linear.scale, other[index].linears[name].scale)


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [(torch.float32, 7), (torch.float16, 13), (torch.bfloat16, 9)],
)
def test_learning(model, tmp_path, dtype, steps):
    model.to(dtype)
    expected, committed = learn(model, None, None)
    stops = 0
    while True:
        with open_checkpoint(tmp_path, {}) as saved:
            try:
                stop = StopAtStep(steps)
                found, again = learn(model, saved, stop)
                break
            except SystemExit as exit:
                assert exit.code == 128 + signal.SIGTERM
                stops += 1
    assert stops > 1
    assert_same(committed, again)
    for one, other in zip(expected.windows, found.windows, strict=True):
        assert (one.start_loss, one.loss) == (other.start_loss, other.loss)
    for one, other in zip(expected.outputs, found.outputs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_closing(model, tmp_path, dtype):
    model.to(dtype)
    layers = list(model.model.layers)
    hidden, calls = capture_decoder(model, layers, rows_of([16] * 6), CPU)
    with torch.no_grad():
        targets = [calls.run_span(range(len(layers)), row) for row in hidden]

    def close(saved, stop):
        linears = tuned_linears(layers, WeightGrid(3, True, 16, torch.float32))
        plan = ClosingSettings(3, 1e-2, 2, torch.float32, 0)
        with frozen(model):
            head = OutputHead(model, calls)
            result = tune_scales(
                calls,
                head,
                linears,
                hidden,
                targets,
                plan,
                CPU,
                saved=saved,
                stop=stop,
            )
        return result, linears

    expected, linears = close(None, None)
    assert not expected.kept_start
    for _ in range(2):
        with open_checkpoint(tmp_path, {}) as saved, pytest.raises(SystemExit):
            close(saved, StopAtStep(3))
    with open_checkpoint(tmp_path, {}) as saved:
        assert saved.progress["closing"]["step"] == 8
        found, again = close(saved, None)
    assert found == expected
    for index, layer in linears.items():
        for name, linear in layer.items():
            assert torch.equal(linear.factor, again[index][name].factor)


@pytest.fixture
def ctrl_c():
    """SIGINT as in the foreground."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(ctrl_c):
    with stop_on_signals() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and isinstance(stop.exit(), KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
