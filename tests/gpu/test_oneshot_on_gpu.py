"""Real runs of both stages on an NVIDIA GPU, with the trained tiny family."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from compressed_tensors.offload import remove_dispatch
from family import (
    RECIPES,
    TESTS,
    calibration_set,
    held_out_rows,
    load,
    logits,
    perplexity,
    quantize,
)
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from transformers import AutoModelForCausalLM

from benchmarks.prove_serving import own_stages
from llmc_faq_slider import FAQModifier, SliderQuantModifier

pytestmark = pytest.mark.gpu

W3A16 = {
    "group_0": {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 3,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 64,
        },
    }
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_recipe_learns_and_its_checkpoint_is_the_model(path, small_model, tmp_path):
    (recipe := tmp_path / "recipe.yaml").write_text(own_stages(path, 8, 128, 2))
    model = load(small_model)
    torch.cuda.reset_peak_memory_stats()
    quantize(model, str(recipe), dataset=calibration_set(small_model, 8))
    assert torch.cuda.max_memory_allocated() > 10e6
    model.save_pretrained(tmp_path / "checkpoint", save_compressed=True)
    # Both on the CPU: offloaded, the model would go on computing on the GPU.
    remove_dispatch(model)
    rows = held_out_rows(small_model, half=1)[:4]
    assert torch.equal(logits(load(tmp_path / "checkpoint"), rows), logits(model, rows))


def test_learning_beats_rounding_to_nearest(small_model):
    rows = held_out_rows(small_model, half=1)[:64]
    nearest, slider = load(small_model), load(small_model)
    format = {"ignore": ["lm_head"], "config_groups": W3A16}
    quantize(nearest, QuantizationModifier(**format))
    stage = SliderQuantModifier(**format, epochs=4)
    quantize(slider, stage, dataset=calibration_set(small_model))
    for model in (nearest, slider):
        remove_dispatch(model)
    full = perplexity(load(small_model), rows)
    ours, theirs = perplexity(slider, rows), perplexity(nearest, rows)
    assert full * 0.99 < ours < (full + theirs) / 2, (full, ours, theirs)


@pytest.mark.parametrize("closing_epochs", [0, 2])
def test_same_inputs_give_the_same_bytes(closing_epochs, small_model, tmp_path):
    """Rows as long as these take several blocks of the attention kernel."""
    for run, place in (("first", "cpu"), ("second", "cpu"), ("on the GPU", "auto")):
        model = AutoModelForCausalLM.from_pretrained(
            small_model, dtype=torch.bfloat16, device_map=place
        )
        quantize(
            model,
            SliderQuantModifier(
                ignore=["lm_head"],
                config_groups=W3A16,
                epochs=2,
                closing_epochs=closing_epochs,
            ),
            dataset=calibration_set(small_model, 8, 1024),
            output_dir=str(tmp_path / run),
        )
    first, *others = (p.read_bytes() for p in tmp_path.glob("*/model.safetensors"))
    assert others == [first, first]


RUN = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/integration"]
import chaos
from family import calibration_set
from pathlib import Path
rows = calibration_set(chaos.MODEL, 4)
chaos.run("bfloat16", {state}, Path({output!r}), rows)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_ended_run_goes_on_to_the_same_bytes(number, tmp_path):
    """In processes of their own: a process that has used a GPU cannot be forked."""

    def start(output, state=None):
        place = None if state is None else f"Path({str(state)!r})"
        code = RUN.format(tests=str(TESTS), output=str(tmp_path / output), state=place)
        return subprocess.Popen([sys.executable, "-c", code])

    state = tmp_path / "state"
    ended = start("ended", state)
    while not list(state.rglob("state-*.json")):
        assert ended.poll() is None
        time.sleep(0.02)
    ended.send_signal(number)
    assert ended.wait() not in (0, 1)
    undisturbed, resumed = start("undisturbed"), start("resumed", state)
    assert undisturbed.wait() == resumed.wait() == 0
    expected = (tmp_path / "undisturbed" / "model.safetensors").read_bytes()
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == expected


def test_rows_are_halved_until_a_step_fits(small_model, gpu):
    """The process is given less memory than it took, and than the GPU says it has."""
    data = calibration_set(small_model, 8, 1024)

    def learn():
        stage = SliderQuantModifier(
            ignore=["lm_head"],
            config_groups=W3A16,
            epochs=1,
            closing_epochs=0,
            batch_size=8,
        )
        quantize(load(small_model), stage, dataset=data)
        return stage

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    learn()
    most = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(gpu).total_memory
    said = []
    sink = logger.add(said.append, level="WARNING")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.7 * most / total)
    try:
        stage = learn()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        logger.remove(sink)
    assert any("rows at a time from now on" in message for message in said), said
    assert all(result.loss <= result.start_loss for result in stage.results)


@pytest.mark.parametrize("generator", ["self", "large"])
def test_regenerated_data_is_learned_from(generator, small_model, tmp_path):
    faq = FAQModifier(
        generator=generator if generator == "self" else str(TESTS / "models" / "large"),
        num_candidates=2,
        num_samples=8,
        sequence_length=64,
        max_new_tokens=16,
        min_response_tokens=1,
        max_repeated_share=1.0,
        max_zlib_ratio=1000.0,
        max_fallback_fraction=1.0,
        cache_dir=str(tmp_path / "faq"),
    )
    slider = SliderQuantModifier(ignore=["lm_head"], config_groups=W3A16, epochs=2)
    torch.cuda.reset_peak_memory_stats()
    quantize(load(small_model), [faq, slider])
    assert torch.cuda.max_memory_allocated() > 10e6
    assert slider.report()["rows"] == 8
    assert any(not result.kept_start for result in slider.results)


def test_sensitivity_command(small_model, tmp_path):
    command = [sys.executable, "-m", "llmc_faq_slider.cli", "sensitivity"]
    done = subprocess.run(
        [*command, str(small_model), "--device", "cuda"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "sensitivity.json").read_text())
    kl = [row["kl"] for row in record["layers"]]
    assert kl[0] > 2 * max(kl[1:])
