"""The round trip: a served sibling writes the data, a client asks what came of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.http_checks import check_http
from benchmarks.prove_serving import family_rows, local_target
from benchmarks.served import computing, token_logprobs, tolerance
from llmc_faq_slider import FAQModifier, SliderQuantModifier, oneshot
from llmc_faq_slider.host.declared import declared_groups
from llmc_faq_slider.report.server import MODEL_NAME, Server, serve
from llmc_faq_slider.report.serving import serve as look_up

pytestmark = pytest.mark.e2e


def w4a8(form: str, symmetric_inputs: bool) -> dict[str, Any]:
    """Config groups: int4 weights in groups of 64, int8 inputs per token."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": 64}
    inputs = {
        "num_bits": 8,
        "strategy": "token",
        "dynamic": True,
        "symmetric": symmetric_inputs,
    }
    return {
        "group_0": {
            "targets": ["Linear"],
            "format": form,
            "weights": weights,
            "input_activations": inputs,
        }
    }


#: for the student the first of these that vLLM serves on this CPU
FORMS = (w4a8("pack-quantized", True), w4a8("int-quantized", False))


@dataclass(frozen=True)
class Trip:
    """What the round trip left, and the model as it was in memory before it was saved.

    :param expected: log-probabilities ``[rows, length - 1]`` as vLLM's kernel computes
    """

    checkpoint: Path
    data: Path
    computes: str
    rows: Tensor
    expected: Tensor


def served_form() -> tuple[SliderQuantModifier, str]:
    """A modifier for a form that vLLM serves here, and the inputs of its kernel."""
    for groups in FORMS:
        slider = SliderQuantModifier(
            ignore=["lm_head"],
            config_groups=groups,
            epochs=2,
            closing_epochs=1,
            batch_size=4,
        )
        (declared,) = declared_groups([slider])
        serving = look_up(declared.group, local_target())
        if serving.served:
            return slider, str(serving.computes)
    raise AssertionError("vLLM serves no form of W4A8 on this CPU")


@pytest.fixture(scope="module")
def trip(
    sibling_server: Server, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trip:
    folder = tmp_path_factory.mktemp("trip")
    faq = FAQModifier(
        generator=f"{sibling_server.url}/v1",
        generator_model=MODEL_NAME,
        num_candidates=2,
        num_samples=16,
        sequence_length=128,
        max_new_tokens=48,
        min_response_tokens=4,
        cache_dir=str(folder / "faq"),
    )
    slider, computes = served_form()
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16)
    oneshot(model=model, recipe=[faq, slider])
    rows = family_rows(small_model, 4, 128, half=1)
    with computing(exact := copy.deepcopy(model).float().eval(), computes):
        expected = token_logprobs(exact, rows)
    model.save_pretrained(folder / "model", save_compressed=True)
    AutoTokenizer.from_pretrained(small_model).save_pretrained(folder / "model")
    return Trip(folder / "model", folder / "faq", computes, rows, expected)


@pytest.fixture(scope="module")
def student(trip: Trip, serve_env: Path) -> Iterator[Server]:
    log = trip.checkpoint.parent / "vllm.log"
    with serve(trip.checkpoint, serve_env, log, timeout=1800) as server:
        yield server


def test_the_served_sibling_wrote_the_data(trip: Trip) -> None:
    (path,) = trip.data.glob("datasets/*/manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["generator"]["kind"] == "endpoint"
    assert manifest["counts"]["candidates"] > 0


def test_clients_get_what_was_trained(trip: Trip, student: Server) -> None:
    """One client, sixteen at once, streamed and whole, completions and chat."""
    figures, failures = check_http(
        student, trip.rows, trip.expected, tolerance(trip.computes)
    )
    print(figures)
    assert not failures


def test_a_client_gets_an_answer(student: Server) -> None:
    # The family answers in the manner of its training text, at times in two words.
    questions = ("Tell me about the weather.", "Who was the king?", "Where is it?")
    assert any(student.chat(question, max_tokens=32).strip() for question in questions)
    beginnings = ("The people of the", "In the morning", "There was once")
    texts = [student.complete(beginning, max_tokens=32) for beginning in beginnings]
    assert max(len(text.split()) for text in texts) > 8


def test_wrong_expectations_are_told_apart(trip: Trip, student: Server) -> None:
    """A control: rows that belong together are told from rows that do not."""
    _, failures = check_http(
        student, trip.rows, trip.expected.roll(1, 0), tolerance(trip.computes)
    )
    assert len(failures) == 2
