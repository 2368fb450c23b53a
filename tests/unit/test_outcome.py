"""What a stage reports of windows that kept their start or began anew."""

import json

import pytest
import torch

from llmc_faq_slider.slider.closing import ClosingResult
from llmc_faq_slider.slider.learning_state import WindowResult
from llmc_faq_slider.slider.outcome import Outcome, remarks
from llmc_faq_slider.slider.windows import Window

pytestmark = pytest.mark.unit

LEARNED = WindowResult(Window(0, 1, "shallow"), 2.0, 1.0, 3.14159)
KEPT = WindowResult(Window(1, 3, "fixed"), 0.5, 0.5, 1.0, kept_start=True)
RETRIED = WindowResult(Window(3, 4, "deep"), 0.5, 0.4, 1.0, retries=1)


def test_what_went_well_is_not_remarked_on():
    assert remarks([LEARNED], None) == []
    assert remarks([LEARNED], ClosingResult(2.0, 1.0)) == []


def test_kept_starts_and_retries_are_named():
    kept, retried = remarks([LEARNED, KEPT, RETRIED], None)
    assert "window over layers 1-2 did not lower its loss of 5.0000e-01" in kept
    assert "window over layer 3 began anew once" in retried
    kept, retried = remarks([], ClosingResult(1.0, 1.0, kept_start=True, retries=2))
    assert "closing pass did not lower its loss of 1.0000e+00" in kept
    assert "closing pass began anew 2 times" in retried


def test_the_record_is_plain_json():
    broken = WindowResult(Window(0, 1, "fixed"), torch.nan, torch.inf, 1.0, True, 2)
    closing = ClosingResult(1.0, 0.5, retries=1)
    outcome = Outcome(8, 512, [LEARNED, broken], closing, ["One sentence."])
    record = json.loads(json.dumps(outcome.record(), allow_nan=False))
    assert (record["rows"], record["tokens"]) == (8, 512)
    assert record["windows"][0] == {
        "first_layer": 0,
        "last_layer": 0,
        "family": "shallow",
        "start_loss": 2.0,
        "loss": 1.0,
        "seconds": 3.142,
        "kept_start": False,
        "retries": 0,
    }
    assert record["windows"][1]["start_loss"] is record["windows"][1]["loss"] is None
    assert record["closing"] == {
        "start_loss": 1.0,
        "loss": 0.5,
        "kept_start": False,
        "retries": 1,
    }
    assert record["warnings"] == ["One sentence."]
    assert Outcome(8, 512, [LEARNED], None, []).record()["closing"] is None
