"""Real ``oneshot`` runs of SliderQuantModifier on the trained tiny family."""

import json

import pytest
import torch
from datasets import Dataset
from family import (
    calibration_set,
    held_out_rows,
    load,
    logits,
    perplexity,
    quantize,
)
from llmcompressor.modifiers.quantization import QuantizationModifier

from llmc_faq_slider import SliderQuantModifier

pytestmark = pytest.mark.integration

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}


def config_group(bits, symmetric, group_size, inputs=None):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    if group_size:
        weights |= {"strategy": "group", "group_size": group_size}
    else:
        weights |= {"strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights}
    if inputs:
        group["input_activations"] = inputs | {"strategy": "token", "dynamic": True}
    return {"group_0": group}


SCHEMES = {
    "W2A16_asym_g64": config_group(2, False, 64),
    "W2A16_g64": config_group(2, True, 64),
    "W3A16_channel": config_group(3, True, None),
    "W3A16_asym_g128": config_group(3, False, 128),
    "W4A16_channel": config_group(4, True, None),
    "W4A16_asym_channel": config_group(4, False, None),
    "W4A8_g128": config_group(4, True, 128, INT8),
    "W4AFP8_g128": config_group(4, True, 128, FP8),
    "W4A4_g64": config_group(4, True, 64, INT4),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_slider_beats_round_to_nearest(name, small_model):
    rows = held_out_rows(small_model, half=1)[:64]
    arguments = {"ignore": ["lm_head"], "config_groups": SCHEMES[name]}

    nearest = load(small_model)
    quantize(nearest, QuantizationModifier(**arguments))
    slider = load(small_model)
    stage = SliderQuantModifier(**arguments, epochs=4, batch_size=8)
    quantize(slider, stage, dataset=calibration_set(small_model))

    full = perplexity(load(small_model), rows)
    ours, theirs = perplexity(slider, rows), perplexity(nearest, rows)
    assert full * 0.99 < ours < theirs, (full, ours, theirs)
    assert any(not result.kept_start for result in stage.results)
    assert all(result.loss <= result.start_loss for result in stage.results)


def test_eight_bits_stay_within_noise_of_round_to_nearest(small_model):
    """Both lose next to nothing; the windows' own losses show what was learned."""
    rows = held_out_rows(small_model, half=1)[:64]
    arguments = {"ignore": ["lm_head"], "scheme": "W8A8"}
    nearest, slider = load(small_model), load(small_model)
    quantize(nearest, QuantizationModifier(**arguments))
    stage = SliderQuantModifier(**arguments, epochs=4, batch_size=8)
    quantize(slider, stage, dataset=calibration_set(small_model))
    assert perplexity(slider, rows) < perplexity(nearest, rows) * 1.002
    assert stage.results[-1].loss < stage.results[-1].start_loss


def test_w4afp8_group_scales_survive_vllms_loader(small_model, tmp_path):
    model = load(small_model)
    stage = SliderQuantModifier(ignore=["lm_head"], scheme="W4AFP8", epochs=1)
    quantize(model, stage, dataset=calibration_set(small_model, 4))
    for name, module in model.named_modules():
        if not hasattr(module, "weight_scale"):
            continue
        scale = module.weight_scale.float()
        unit = scale.amax(-1, keepdim=True) / 448
        # The loader keeps E4M3 codes of an eighth, and the row's unit in fp32.
        codes = (scale / unit).to(torch.float8_e4m3fn).float()
        loaded = (codes / 8).to(torch.float8_e4m3fn).float() * 8 * unit
        assert ((loaded - scale).abs() / scale).max() <= 2**-8, name


@pytest.mark.parametrize("name", ["W4A8_g128", "W8A8", "W2A16_asym_g64", "W4AFP8_g128"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reload_is_bit_equal(name, dtype, small_model, tmp_path):
    groups = {**SCHEMES, "W8A8": config_group(8, True, None, INT8)}[name]
    rows = held_out_rows(small_model, half=1)[:4]
    model = load(small_model, dtype)
    stage = SliderQuantModifier(
        ignore=["lm_head"], config_groups=groups, epochs=2, batch_size=8
    )
    quantize(model, stage, dataset=calibration_set(small_model, 8))
    expected = logits(model, rows)
    model.save_pretrained(tmp_path, save_compressed=True)
    assert torch.equal(logits(load(tmp_path, dtype), rows), expected)

    config = json.loads((tmp_path / "config.json").read_text())
    source = json.loads((small_model / "config.json").read_text())
    assert set(config) - set(source) == {"quantization_config"}
    saved_format = config["quantization_config"]["config_groups"]["group_0"]["format"]
    assert saved_format == ("int-quantized" if name == "W8A8" else "pack-quantized")


def test_same_inputs_give_the_same_bytes(small_model, tmp_path):
    for run in ("first", "second"):
        model = load(small_model)
        quantize(
            model,
            SliderQuantModifier(ignore=["lm_head"], scheme="W4A16", epochs=2),
            dataset=calibration_set(small_model, 8),
            output_dir=str(tmp_path / run),
        )
    first = (tmp_path / "first" / "model.safetensors").read_bytes()
    assert first == (tmp_path / "second" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("inputs", "quantized_inputs", "decide"),
    [
        (INT8, "auto", False),
        (INT8, True, True),
        (INT4, "auto", True),
        (INT4, False, False),
    ],
)
def test_inputs_decide_weights_where_they_are_learned_on(
    inputs, quantized_inputs, decide, small_model
):
    def learned(inputs, **settings):
        model = load(small_model)
        stage = SliderQuantModifier(
            ignore=["lm_head"],
            config_groups=config_group(4, True, 64, inputs),
            **settings,
        )
        quantize(model, stage, dataset=calibration_set(small_model, 8))
        return model.model.layers[-1].mlp.down_proj.weight

    weights = learned(inputs, quantized_inputs=quantized_inputs)
    assert torch.equal(weights, learned(None)) is not decide


def test_stages_inside_each_window_beat_rounding_to_nearest(small_model):
    rows = held_out_rows(small_model, half=1)[:16]
    model = load(small_model)
    stage = SliderQuantModifier(
        ignore=["lm_head"],
        config_groups=SCHEMES["W2A16_asym_g64"],
        ratio=0.5,
        epochs=4,
        batch_size=8,
    )
    quantize(model, stage, dataset=calibration_set(small_model, 16))
    nearest = load(small_model)
    quantize(
        nearest,
        QuantizationModifier(
            ignore=["lm_head"], config_groups=SCHEMES["W2A16_asym_g64"]
        ),
    )
    assert perplexity(model, rows) < perplexity(nearest, rows)


def test_samples_of_different_length_with_padding(small_model):
    rows = held_out_rows(small_model, half=0)[:6].tolist()
    lengths = [128, 40, 96, 128, 1, 40]
    data = {
        "input_ids": [row[:n] + [0] * (128 - n) for row, n in zip(rows, lengths)],
        "attention_mask": [[1] * n + [0] * (128 - n) for n in lengths],
    }
    model = load(small_model)
    stage = SliderQuantModifier(ignore=["lm_head"], scheme="W4A16", epochs=2)
    quantize(model, stage, dataset=Dataset.from_dict(data))
    assert all(torch.isfinite(torch.tensor(r.loss)) for r in stage.results)


def test_targets_of_one_projection_only(small_model):
    model = load(small_model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    stage = SliderQuantModifier(targets=["re:.*down_proj"], scheme="W4A16", epochs=2)
    quantize(model, stage, dataset=calibration_set(small_model, 8))
    after = dict(model.named_parameters())
    changed = {n for n, p in before.items() if not torch.equal(after[n], p)}
    assert changed and all("down_proj" in name for name in changed)


def test_fp16_learns_and_its_checkpoint_loads(small_model, tmp_path):
    rows = held_out_rows(small_model, half=1)[:2]
    model = load(small_model, torch.float16)
    stage = SliderQuantModifier(
        ignore=["lm_head"], scheme="W4A16", preset="fast", batch_size=1
    )
    data = calibration_set(small_model, 16)
    quantize(model, stage, dataset=data, output_dir=str(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    for result in stage.results:
        assert result.retries == 0 and result.loss <= result.start_loss
    first, last = stage.results[0], stage.results[-1]
    assert first.loss < 0.7 * first.start_loss and last.loss < last.start_loss
    saved = load(tmp_path, torch.float16)
    assert torch.equal(logits(saved, rows), logits(model, rows))
