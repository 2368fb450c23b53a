"""Recipes that llm-compressor would run silently wrong are refused before any work.

Plumbing only: what the model's weights are does not matter here.
"""

import pytest
import torch
from datasets import Dataset
from family import calibration_set, load, quantize
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

from llmc_faq_slider import SliderQuantModifier

pytestmark = pytest.mark.integration

SLIDER = {"scheme": "W4A16", "ignore": ["lm_head"], "epochs": 1}


def refused(small_model, recipe, message, **arguments):
    model = load(small_model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        quantize(model, recipe, **arguments)
    after = dict(model.named_parameters())
    for name, parameter in before.items():
        assert torch.equal(after[name], parameter), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ["re:.*dwon_proj"]}, "Similar names: .*down_proj"),
        ({"ignore": []}, "also match lm_head. Add it to ignore"),
        ({"scheme": None}, "has no number format"),
        ({"scheme": "FP8_DYNAMIC"}, "learns integer weights of 2 to 8 bits"),
        ({"window_stride": 3}, "window_stride must lie between 1"),
        ({"scheme": "W4AFP8", "target": "sm80"}, "not served on sm80"),
        ({"target": "h100"}, "target 'h100' is not known"),
    ],
)
def test_stage_by_itself(fields, message, small_model):
    settings = SLIDER | fields
    if settings["scheme"] is None:
        settings = {"epochs": 1}
    refused(
        small_model,
        SliderQuantModifier(**settings),
        message,
        dataset=calibration_set(small_model, 2),
    )


def test_groups_that_do_not_divide_the_inputs(small_model):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 48}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    refused(
        small_model,
        SliderQuantModifier(ignore=["lm_head"], config_groups=groups),
        "Groups of 48 do not divide .*q_proj .*Groups of 128, 64, 32, 16 divide all",
        dataset=calibration_set(small_model, 2),
    )


def test_no_calibration_data(small_model):
    refused(small_model, SliderQuantModifier(**SLIDER), "needs calibration data")


def test_samples_without_tokens(small_model):
    data = Dataset.from_dict({"input_ids": [[3], [5]], "attention_mask": [[1], [1]]})
    refused(
        small_model, SliderQuantModifier(**SLIDER), "no sample of two", dataset=data
    )


def test_static_inputs(small_model):
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor"},
        }
    }
    stage = SliderQuantModifier(config_groups=groups, ignore=["lm_head"])
    data = calibration_set(small_model, 2)
    refused(small_model, stage, "dynamic per-token inputs", dataset=data)


def test_stages_on_the_same_layers(small_model):
    recipe = [
        SliderQuantModifier(targets=["re:.*mlp.*"], scheme="W4A16", epochs=1),
        GPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W4A16"),
    ]
    data = calibration_set(small_model, 2)
    refused(small_model, recipe, "both target 24 layers", dataset=data)


def test_complementary_ignores(small_model):
    recipe = [
        SliderQuantModifier(scheme="W4A16", ignore=["lm_head", "re:.*mlp.*"], epochs=1),
        GPTQModifier(scheme="W8A16", ignore=["lm_head", "re:.*self_attn.*"]),
    ]
    data = calibration_set(small_model, 2)
    refused(small_model, recipe, "differ in ignore only", dataset=data)


def test_smoothing_after_quantisation(small_model):
    recipe = [SliderQuantModifier(**SLIDER), SmoothQuantModifier()]
    data = calibration_set(small_model, 2)
    refused(small_model, recipe, "Put it before", dataset=data)


def test_shared_pipeline_would_turn_the_order_round(small_model):
    recipe = [
        GPTQModifier(targets=["re:.*self_attn.*"], scheme="W4A16"),
        SliderQuantModifier(targets=["re:.*mlp.*"], scheme="W4A16", epochs=1),
    ]
    refused(
        small_model,
        recipe,
        'Leave pipeline at its default, "independent"',
        dataset=calibration_set(small_model, 2),
        pipeline="sequential",
    )
