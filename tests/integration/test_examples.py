"""Every script in examples/ as its docstring says, on the tiny family."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from family import held_out_rows, load, logits
from safetensors.torch import load_file
from typer.testing import CliRunner

import llmc_faq_slider
from llmc_faq_slider.cli import app

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"
# Models this small often answer too shortly for the default gates.
FEW = {"num_samples": 8, "sequence_length": 128, "max_fallback_fraction": 1.0}


@pytest.fixture(autouse=True)
def few_answers(monkeypatch):
    stage = partial(llmc_faq_slider.FAQModifier, **FEW)
    monkeypatch.setattr(llmc_faq_slider, "FAQModifier", stage)


@pytest.fixture
def run(monkeypatch):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def check(model: Path, output: Path, bits: int) -> None:
    """The checkpoint declares its bits and still knows the language."""
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {bits}
    tensors = load_file(output / "model.safetensors")
    assert not [name for name in tensors if name.endswith("proj.weight")]
    rows = held_out_rows(model, half=1)[:4]
    full, ours = logits(load(model), rows), logits(load(output), rows)
    agreement = (full.argmax(-1) == ours.argmax(-1)).float().mean().item()
    assert agreement > 0.5


def test_every_example_has_a_test():
    text = Path(__file__).read_text()
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))


def test_slider_on_your_texts(run, small_model, tmp_path):
    texts = tmp_path / "texts.jsonl"
    held_out = sorted((EXAMPLES.parent / "tests/data/heldout").glob("*.txt"))
    passages = [path.read_text()[i : i + 400] for path in held_out for i in range(8)]
    texts.write_text("".join(json.dumps({"text": t}) + "\n" for t in passages))
    run("slider_on_your_texts.py", small_model, texts, tmp_path / "out")
    check(small_model, tmp_path / "out", bits=3)


def test_faq_then_slider(run, small_model, large_model, tmp_path):
    run("faq_then_slider.py", small_model, large_model, tmp_path / "out")
    check(small_model, tmp_path / "out", bits=4)


def test_slider_beside_gptq(run, small_model, large_model, tmp_path):
    command = ["regenerate", small_model, "--generator", large_model]
    command += ["-o", tmp_path / "data"]
    for name, value in FEW.items():
        command += ["--set", f"{name}={value}"]
    assert CliRunner().invoke(app, [*map(str, command)]).exit_code == 0
    run("slider_beside_gptq.py", small_model, tmp_path / "data", tmp_path / "out")
    check(small_model, tmp_path / "out", bits=4)
