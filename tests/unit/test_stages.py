"""What a recipe author meets: registration, samples, fields and their messages."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.recipe import Recipe
from pydantic import ValidationError

import llmc_faq_slider
from llmc_faq_slider import FAQModifier, SliderQuantModifier

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
STAGES = [FAQModifier, SliderQuantModifier]


@pytest.mark.parametrize("stage", STAGES)
def test_docstring_sample_loads(stage):
    samples = re.findall(r"```yaml\n(.*?)```", inspect.getdoc(stage), re.S)
    assert samples
    for sample in samples:
        (modifier,) = Recipe.create_instance(sample).modifiers
        assert type(modifier) is stage


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_is_documented_and_survives_a_round_trip(stage):
    inherited = {
        name
        for base in stage.__mro__[1:]
        for name in getattr(base, "model_fields", {})
        if base.__module__.startswith("llmcompressor")
    }
    documented = "".join(
        base.__doc__ or ""
        for base in stage.__mro__
        if base.__module__.startswith("llmc_faq_slider")
    )
    for name in set(stage.model_fields) - inherited:
        assert f":param {name}:" in documented, name
    arguments = {"scheme": "W4A16"} if stage is SliderQuantModifier else {}
    modifier = stage(**arguments)
    dumped = yaml.safe_load(yaml.safe_dump(modifier.model_dump()))
    assert stage.model_validate(dumped) == modifier


def printed_by(command):
    return subprocess.run(
        [sys.executable, "-c", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_import_registers_both_stages_in_a_fresh_process():
    command = (
        "import llmc_faq_slider; from llmcompressor.recipe import Recipe; "
        "print(Recipe.create_instance('recipes/faq_slider_w4a8.yaml').modifiers)"
    )
    printed = printed_by(command)
    assert "FAQModifier(" in printed and "SliderQuantModifier(" in printed


def test_import_prints_nothing_and_leaves_llm_compressors_log_alone():
    command = (
        "import llmc_faq_slider; "
        "from llmcompressor.logger import LOGGER_CONFIG, LoggerConfig, logger; "
        "from llmcompressor.recipe import Recipe; "
        "print('imported'); "
        "Recipe.create_instance('recipes/slider_w4a16.yaml'); "
        "logger.log('METRIC', 'seen'); "
        "print(LOGGER_CONFIG == LoggerConfig())"
    )
    printed = printed_by(command)
    assert printed.startswith("imported\n")
    assert "Loading recipe from file" in printed and "seen" in printed
    assert printed.endswith("True\n")


def test_oneshot_takes_what_llm_compressors_takes():
    from llmcompressor import oneshot

    assert inspect.signature(llmc_faq_slider.oneshot) == inspect.signature(oneshot)
    assert llmc_faq_slider.oneshot.__wrapped__ is oneshot


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "stages:\n  - quant_stage\n"}, "key of its own"),
        ({"recipe": "recipes/slider_w4a16.yml"}, "Did you mean .*slider_w4a16.yaml"),
        ({"recipe": ["recipes/slider_w4a16.yaml"]}, "no list of files"),
        ({"recipe": "recipes/slider_w4a16.yaml", "stage": "faq"}, "No stage"),
        (
            {"recipe": [GPTQModifier(targets=["re:.*mlp.*"], scheme="W4A16")]},
            "GPTQModifier needs calibration data",
        ),
    ],
)
def test_oneshot_refuses_before_it_loads_a_model(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        llmc_faq_slider.oneshot(model="no/such-model", **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": 0.5}, "2 stages, which need at least 2 epochs, and epochs is 1"),
        ({"low_rank": -1}, "low_rank"),
        ({"stage_order": "sweep"}, "stage_order was removed: sweeps over all windows"),
        ({"widnow_size": 3}, "widnow_size"),
        ({"shallow_layers": -1}, "shallow_layers"),
        ({"deep_layers": "all"}, "deep_layers"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValidationError, match=message):
        SliderQuantModifier(scheme="W4A16", **fields)


def test_pack_quantized_is_the_format_below_eight_bits_only():
    def formats(scheme):
        stage = SliderQuantModifier(scheme=scheme)
        return [g.format for g in stage.resolved_config.config_groups.values()]

    assert formats("W4A8") == formats("W4AFP8") == formats("W4A4") == ["pack-quantized"]
    assert formats("W2A16") == formats("W4A16_ASYM") == ["pack-quantized"]
    assert formats("W8A8") == [None]


def test_presets_expand_to_values_that_the_recipe_can_overrule():
    fast = SliderQuantModifier(scheme="W4A16", preset="fast")
    default = SliderQuantModifier(scheme="W4A16")
    best = SliderQuantModifier(scheme="W4A16", preset="best")
    assert fast.epochs == default.epochs < best.epochs
    assert fast.closing_epochs < default.closing_epochs < best.closing_epochs
    assert best.ratio < default.ratio == 1
    assert SliderQuantModifier(**best.model_dump()) == best
    mixed = SliderQuantModifier(scheme="W4A16", preset="fast", epochs=7)
    assert mixed.epochs == 7 and mixed.closing_epochs == fast.closing_epochs
    assert fast.model_dump()["epochs"] == fast.epochs
    with pytest.raises(ValidationError, match="fast"):
        SliderQuantModifier(scheme="W4A16", preset="quick")
