"""Recipes that mix our stages with llm-compressor's own, saved and loaded again.

The tiny family proves here that the parts fit; quality is measured elsewhere.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from family import (
    RECIPES,
    calibration_set,
    held_out_rows,
    load,
    logits,
    quantize,
)
from llmcompressor.recipe import Recipe

from llmc_faq_slider import SliderQuantModifier
from llmc_faq_slider.slider.learner import stage_ratios

pytestmark = pytest.mark.integration

FAQ = {
    "FAQModifier": {
        "num_samples": 4,
        "sequence_length": 64,
        "num_candidates": 2,
        "max_new_tokens": 48,
        "min_response_tokens": 1,
        "max_fallback_fraction": 1.0,
    }
}
SMOOTHQUANT = {"SmoothQuantModifier": {"smoothing_strength": 0.5}}
SPINQUANT = {"SpinQuantModifier": {"rotations": ["R1"], "transform_type": "hadamard"}}
W4A16 = {
    "group_0": {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 128,
        },
    }
}


def targeting(groups, target):
    return {"group_0": groups["group_0"] | {"targets": [target]}}


def slider(groups, **fields):
    settings = {"config_groups": groups, "epochs": 1, "batch_size": 4} | fields
    return {"SliderQuantModifier": settings}


def gptq(groups, actorder="weight", **fields):
    settings = {"config_groups": groups} | fields
    if actorder is not None:
        settings["actorder"] = actorder
    return {"GPTQModifier": settings}


LM_HEAD = {"ignore": ["lm_head"]}
ATTENTION, MLP = "re:.*self_attn.*_proj$", "re:.*mlp.*_proj$"
# name: (stages in order, whether oneshot gets a data set)
MIXES = {
    "slider_alone": ([slider(W4A16, **LM_HEAD)], True),
    "faq_gptq": ([FAQ, gptq(W4A16, **LM_HEAD)], False),
    "smoothquant_slider": ([SMOOTHQUANT, slider(W4A16, **LM_HEAD)], True),
    "slider_attention_gptq_mlp": (
        [slider(targeting(W4A16, ATTENTION)), gptq(targeting(W4A16, MLP))],
        True,
    ),
    "gptq_attention_slider_mlp": (
        [gptq(targeting(W4A16, ATTENTION)), slider(targeting(W4A16, MLP))],
        True,
    ),
    "spinquant_slider": ([SPINQUANT, slider(W4A16, **LM_HEAD)], True),
    "faq_smoothquant_slider": ([FAQ, SMOOTHQUANT, slider(W4A16, **LM_HEAD)], False),
    # Upstream saves both of these stages in a form that it cannot load.
    "faq_smoothquant_gptq": (
        [FAQ, SMOOTHQUANT, gptq(W4A16, actorder=None, **LM_HEAD)],
        False,
    ),
    "faq_slider_with_data": ([FAQ, slider(W4A16, **LM_HEAD)], True),
}


def written(stages, path):
    recipe = {
        "test_stage": {f"part{i}_modifiers": stage for i, stage in enumerate(stages)}
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(path)


@pytest.fixture(autouse=True)
def faq_cache(tmp_path_factory, monkeypatch):
    root = tmp_path_factory.getbasetemp() / "faq"
    monkeypatch.setenv("LLMC_FAQ_SLIDER_CACHE", str(root))


def stage_names(recipe):
    return [type(m).__name__ for m in Recipe.create_instance(str(recipe)).modifiers]


@pytest.mark.parametrize("name", MIXES)
def test_mix_reloads_bit_equal_and_keeps_its_recipe(name, small_model, tmp_path):
    stages, with_data = MIXES[name]
    recipe = written(stages, tmp_path / "recipe.yaml")
    model = load(small_model)
    full = logits(model, held_out_rows(small_model, half=1)[:4])
    data = {"dataset": calibration_set(small_model, 4)} if with_data else {}
    output = tmp_path / "checkpoint"
    quantize(model, recipe, output_dir=str(output), **data)

    rows = held_out_rows(small_model, half=1)[:4]
    expected = logits(model, rows)
    assert torch.equal(logits(load(output), rows), expected)
    error = (expected - full).square().mean() / full.square().mean()
    assert 0 < error < 0.1

    assert stage_names(output / "recipe.yaml") == [next(iter(s)) for s in stages]
    assert all(type(d) is dict for d in json.loads(config_groups(output)).values())
    quantized = [m for m in model.modules() if hasattr(m, "quantization_scheme")]
    assert len(quantized) == 7 * model.config.num_hidden_layers


def config_groups(output: Path) -> str:
    config = json.loads((output / "config.json").read_text())
    return json.dumps(config["quantization_config"]["config_groups"])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipe_loads_and_runs(path, small_model, tmp_path):
    """As it stands, but for the amount of data: the tiny family only babbles."""
    modifiers = Recipe.create_instance(str(path)).modifiers
    for modifier in modifiers:
        if type(modifier).__name__ == "FAQModifier":
            for field, value in FAQ["FAQModifier"].items():
                setattr(modifier, field, value)
        if type(modifier).__name__ == "SliderQuantModifier":
            modifier.epochs = len(stage_ratios(modifier.ratio))
            modifier.closing_epochs = 1
    model = load(small_model)
    needs_data = not path.stem.startswith("faq")
    data = {"dataset": calibration_set(small_model, 4)} if needs_data else {}
    quantize(model, modifiers, output_dir=str(tmp_path), **data)
    rows = held_out_rows(small_model, half=1)[:2]
    assert torch.equal(logits(load(tmp_path), rows), logits(model, rows))
    for group in json.loads(config_groups(tmp_path)).values():
        packed = group["weights"]["num_bits"] < 8 and "_cpu" not in path.stem
        assert group["format"] == ("pack-quantized" if packed else "int-quantized")
    assert stage_names(tmp_path / "recipe.yaml") == [
        type(m).__name__ for m in modifiers
    ]


def test_end_layers_at_more_bits_are_learned_in_the_same_stage(small_model, tmp_path):
    recipe = yaml.safe_load((RECIPES / "slider_w2a16_ends_w4.yaml").read_text())
    fields = recipe["quant_stage"]["slider_modifiers"]["SliderQuantModifier"]
    model = load(small_model)
    stage = SliderQuantModifier(**fields, epochs=1)
    data = calibration_set(small_model, 4)
    quantize(model, stage, dataset=data, output_dir=str(tmp_path))
    bits = [
        layer.self_attn.q_proj.quantization_scheme.weights.num_bits
        for layer in model.model.layers
    ]
    assert bits == [4, 4, 2, 2, 2, 2, 2, 2]
    assert len(stage.results) > 1


def test_rotations_are_folded_into_the_weights(small_model, tmp_path):
    recipe = str(RECIPES / "spinquant_slider_w4a4.yaml")
    modifiers = Recipe.create_instance(recipe).modifiers
    modifiers[1].epochs = 1
    data = calibration_set(small_model, 4)
    quantize(load(small_model), modifiers, dataset=data, output_dir=str(tmp_path))
    quantization = json.loads((tmp_path / "config.json").read_text())
    rotations = quantization["quantization_config"]["transform_config"]["config_groups"]
    locations = {
        apply["location"]
        for rotation in rotations.values()
        for apply in rotation["apply"]
    }
    # "input" and "output" would be online; a server leaves these two alone.
    assert locations <= {"weight_input", "weight_output"}


def test_shipped_recipes_are_the_promised_ones():
    assert {p.stem for p in RECIPES.glob("*.yaml")} == {
        "faq_slider_w4a8",
        "faq_slider_w4a8_g64",
        "faq_slider_w4a8_cpu",
        "faq_slider_w4a8_cpu_g64",
        "faq_slider_w4afp8",
        "slider_w4a16",
        "slider_w4a16_asym",
        "slider_w3a16",
        "slider_w2a16",
        "slider_w2a16_ends_w4",
        "slider_w8a8",
        "slider_w4a4",
        "spinquant_slider_w4a4",
        "faq_gptq_w4a16",
        "smoothquant_slider_w4a8",
    }
