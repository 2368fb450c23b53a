"""Several processes are refused before any work."""

import os
import subprocess
import sys
from pathlib import Path

import llmcompressor
import pytest
from typer.testing import CliRunner

import llmc_faq_slider
from llmc_faq_slider.cli import app
from llmc_faq_slider.processes import refuse_many_processes

pytestmark = pytest.mark.integration

SLIDER = "quant_stage: {quant_modifiers: {SliderQuantModifier: {scheme: W4A16}}}"
FAQ = "data_stage: {data_modifiers: {FAQModifier: {num_samples: 2}}}"
SENTENCE = (
    "WORLD_SIZE says 2 processes, and FAQ and SliderQuant run in one: several would "
    "overwrite each other's weights. Start it with python instead of torchrun, and "
    "choose its GPU with CUDA_VISIBLE_DEVICES; where there is no launcher, unset "
    "WORLD_SIZE."
)
# Begins as llm-compressor's guide to several processes does.
SCRIPT = """
import sys

import llmcompressor
import torch.distributed

import llmc_faq_slider

torch.distributed.init_process_group("gloo")
model, recipe, output = sys.argv[1:]
try:
    llmc_faq_slider.oneshot(model=model, recipe=recipe, output_dir=output)
except ValueError as error:
    print(torch.distributed.get_rank(), error, flush=True)
llmcompressor.oneshot(model=model, recipe=recipe, output_dir=output)
"""


@pytest.mark.parametrize("value", ["", "1", "none"])
def test_one_process_is_let_through(value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    refuse_many_processes()


@pytest.mark.parametrize("oneshot", [llmc_faq_slider.oneshot, llmcompressor.oneshot])
@pytest.mark.parametrize("recipe", [SLIDER, FAQ])
def test_stages_and_oneshot_refuse(oneshot, recipe, small_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError) as error:
        oneshot(model=str(small_model), recipe=recipe)
    assert str(error.value) == SENTENCE


@pytest.mark.parametrize("command", ["sensitivity", "regenerate"])
def test_commands_refuse(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, [command, "no/such-model"])
    assert result.exit_code == 2
    assert result.stderr == f"Error: {SENTENCE}\n"


def test_every_rank_of_torchrun_says_it(small_model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = [str(small_model), SLIDER, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = SENTENCE.replace("WORLD_SIZE says", "torch.distributed has", 1)
    assert ended.returncode != 0
    for rank in (0, 1):
        assert f"{rank} {said}\n" in ended.stdout
    assert f"ValueError: {said}\n" in ended.stderr
    assert not (tmp_path / "out").exists()
