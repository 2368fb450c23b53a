"""A run that is killed goes on where it was and ends with the same bytes."""

import re
import subprocess
import sys

import pytest
import torch
import yaml
from compressed_tensors.offload import load_offloaded_model
from family import TESTS, calibration_set, load, quantize
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc_faq_slider import SliderQuantModifier
from llmc_faq_slider.host import postconditions
from llmc_faq_slider.slider.checkpoint import StateError

pytestmark = pytest.mark.integration

FIELDS = {
    "ignore": ["lm_head"],
    "scheme": "W8A8",
    "shallow_layers": 1,
    "deep_layers": 1,
    "window_size": 4,
    "window_stride": 4,
    "epochs": 1,
    "closing_epochs": 1,
}


@pytest.mark.parametrize(("signal", "kills"), [("KILL", 20), ("TERM", 4), ("INT", 4)])
def test_random_ends_change_nothing(signal, kills):
    found = subprocess.run(
        [
            sys.executable,
            TESTS / "chaos.py",
            f"--kills={kills}",
            f"--signal={signal}",
        ],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith(f"{kills} identical\n")


def stage(folder, **changes):
    return SliderQuantModifier(**FIELDS | changes, checkpoint_dir=str(folder))


def test_another_run_is_refused_and_the_state_stays(small_model, tmp_path):
    data = calibration_set(small_model, 4)
    first = stage(tmp_path)
    quantize(load(small_model), first, dataset=data)

    def refused(message, model=None, rows=data, **changes):
        with pytest.raises(StateError, match=message):
            quantize(
                model or load(small_model), stage(tmp_path, **changes), dataset=rows
            )

    refused("recipe.batch_size is 4 there and 2 here", batch_size=2)
    refused("recipe.seed is 0 there and 7 here", seed=7)
    refused(
        "data.ids differs; .*data.rows is 4 there", rows=calibration_set(small_model)
    )
    other = load(small_model)
    with torch.no_grad():
        other.model.layers[5].mlp.up_proj.weight[3, 3] += 1
    refused("model.weights differs", model=other)
    refused("model.weights differs", model=load(small_model, torch.float32))

    again = stage(tmp_path, strict=False)
    quantize(load(small_model), again, dataset=data)
    assert again.results == first.results


def test_stages_have_folders_of_their_own_and_finished_ones_are_not_repeated(
    small_model, tmp_path, monkeypatch
):
    data = calibration_set(small_model, 4)
    monkeypatch.setenv("LLMC_FAQ_SLIDER_CHECKPOINT_DIR", str(tmp_path / "state"))

    def run(name):
        stages = [
            SliderQuantModifier(**FIELDS | {"targets": [target], "ignore": []})
            for target in ("re:.*self_attn.*proj", "re:.*mlp.*proj")
        ]
        output = tmp_path / name
        quantize(load(small_model), stages, dataset=data, output_dir=str(output))
        content = (output / "model.safetensors").read_bytes()
        return [one.results for one in stages], content

    results, content = run("first")
    folders = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert folders == ["slider-1", "slider-2"]
    # Equal to the second they took: nothing was learned again.
    assert run("second") == (results, content)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, small_model):
    model = load(small_model)
    with torch.no_grad():
        model.model.layers[3].self_attn.q_proj.weight[0, 0] = value
    name = "model.layers.3.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=f"1 weights hold NaN or infinity: {name}"):
        quantize(
            model,
            SliderQuantModifier(**FIELDS),
            dataset=calibration_set(small_model, 2),
        )


def test_a_linear_that_no_token_reaches_is_rounded_and_reported(small_model):
    model = load(small_model)
    for layer in model.model.layers:
        layer.mlp.other = nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)
    one = SliderQuantModifier(**FIELDS)
    quantize(model, one, dataset=calibration_set(small_model, 2))
    assert "No calibration token reaches 8 linears" in one.warnings[0]
    assert one.report()["idle"]["linears"] == 8
    assert hasattr(model.model.layers[0].mlp.other, "weight_scale")


def going_on(message):
    """The folder that a message names, and the fields to go on with."""
    found = re.search(r"checkpoint_dir: (\S+) and (\w+): (\w+)", message)
    folder, name, value = found.groups()
    return folder, {name: yaml.safe_load(value)}


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("named", [True, False])
def test_windows_survive_a_closing_pass_that_fails(named, small_model, tmp_path):
    data = calibration_set(small_model, 4)
    given = {"checkpoint_dir": str(tmp_path)} if named else {}
    model = load(small_model)
    # The dry pass runs the model and tries its head before the closing pass begins.
    broken = iter([False] * 2)

    def fails_late(_module, args):
        if next(broken, True):
            raise RuntimeError("no kernel for this head")

    model.lm_head.register_forward_pre_hook(fails_late)
    with pytest.raises(RuntimeError, match="closing pass failed: no kernel") as failed:
        quantize(model, SliderQuantModifier(**FIELDS, **given), dataset=data)
    folder, change = going_on(str(failed.value))
    assert change == {"closing_epochs": 0}
    assert not named or folder == str(tmp_path)

    whole, again = load(small_model), load(small_model)
    one = SliderQuantModifier(**FIELDS | change)
    quantize(whole, one, dataset=data)
    two = stage(folder, **change)
    quantize(again, two, dataset=data)
    # Equal but for the seconds of a window, which tell that none was learned again.
    assert [r.loss for r in two.results] == [r.loss for r in one.results]
    assert [r.seconds for r in two.results] != [r.seconds for r in one.results]
    found = weights_of(again)
    for name, tensor in weights_of(whole).items():
        assert torch.equal(found[name], tensor), name

    # or with the cause removed
    closed = load(small_model)
    three = stage(folder)
    quantize(closed, three, dataset=data)
    assert three.report()["closing"] is not None
    assert three.results == two.results


def test_weights_on_the_disk_are_the_same_run(small_model, tmp_path):
    data = calibration_set(small_model, 4)
    folder = tmp_path / "offload"
    folder.mkdir()
    with load_offloaded_model():
        model = AutoModelForCausalLM.from_pretrained(
            small_model,
            dtype=torch.bfloat16,
            device_map="auto_offload",
            max_memory={"cpu": 600_000},
            offload_folder=folder,
        )
    first = stage(tmp_path / "state")
    quantize(
        model, first, dataset=data, tokenizer=AutoTokenizer.from_pretrained(small_model)
    )
    second = stage(tmp_path / "state")
    quantize(load(small_model), second, dataset=data)
    assert second.results == first.results


def test_a_result_that_fails_a_check_is_kept(small_model, monkeypatch):
    data = calibration_set(small_model, 4)
    model = load(small_model)
    monkeypatch.setattr(postconditions, "TOLERANCE", {torch.bfloat16: -1.0})
    with pytest.raises(RuntimeError, match="differs from what was trained") as failed:
        quantize(model, SliderQuantModifier(**FIELDS), dataset=data)
    folder, change = going_on(str(failed.value))
    assert change == {"strict": False}
    again = load(small_model)
    one = stage(folder, **change)
    quantize(again, one, dataset=data)
    assert "differs from what was trained" in one.warnings[-1]
    assert one.report()["closing"] is not None
    found = weights_of(again)
    for name, tensor in weights_of(model).items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_the_caller_switched_off(off, small_model, tmp_path):
    data = calibration_set(small_model, 4)

    def saved(name):
        one, folder = SliderQuantModifier(**FIELDS), tmp_path / name
        quantize(load(small_model), one, dataset=data, output_dir=str(folder))
        return (folder / "model.safetensors").read_bytes()

    with off():
        found = saved("off")
        assert not torch.is_grad_enabled()
    assert found == saved("on")
