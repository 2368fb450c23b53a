"""Fields of the stage, and the sample recipe in its docstring."""

import inspect
import re
import textwrap

import pytest
import torch
import yaml
from llmcompressor.recipe import Recipe
from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer

from llmc_faq_slider.cli import regenerate
from llmc_faq_slider.faq.generators import sibling_source
from llmc_faq_slider.faq.modifier import FAQModifier
from llmc_faq_slider.faq.options import CACHE_VARIABLE, FAQOptions, options_of
from llmc_faq_slider.host.calibration_data import rows_loader, takes_loss_mask

pytestmark = pytest.mark.unit


def test_the_sample_recipe_loads() -> None:
    sample = re.search(r"```yaml\n(.*?)```", FAQModifier.__doc__, re.DOTALL)
    assert sample is not None
    (stage,) = Recipe.create_instance(textwrap.dedent(sample[1])).modifiers
    assert isinstance(stage, FAQModifier)
    assert (stage.num_samples, stage.sequence_length) == (32, 512)


def test_a_stage_survives_its_own_dump() -> None:
    stage = FAQModifier(generator="x", num_candidates=2, selector="random")
    assert FAQModifier.model_validate(stage.model_dump()) == stage


def test_what_was_saved_without_a_choice_loads_again() -> None:
    stage = FAQModifier()
    assert stage.num_candidates == 1
    assert FAQModifier(**stage.model_dump()) == stage


def test_the_command_has_the_defaults_of_the_stage() -> None:
    arguments = inspect.signature(regenerate).parameters
    for name in ("generator", "num_candidates", "selector", "seed"):
        assert arguments[name].default == FAQOptions.model_fields[name].default


def test_the_stage_sits_in_the_data_free_slot() -> None:
    assert FAQModifier().requires_calibration_data is False


def test_every_field_is_documented() -> None:
    fields = FAQOptions.model_fields
    missing = [name for name in fields if f":param {name}:" not in FAQOptions.__doc__]
    assert not missing


@pytest.mark.parametrize(
    "fields",
    [
        {"num_candidates": 0},
        {"temperature": 0},
        {"top_p": 1.5},
        {"max_fallback_fraction": 2},
        {"selector": "best"},
        {"selector": "random"},
        {"expert": "target", "num_candidates": 1},
        {"generator": ""},
        {"unknown": 1},
        {"generator": "http://"},
        {"expert": "https://me:secret@example.org/v1"},
    ],
)
def test_bad_fields_are_named(fields) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        FAQModifier(**fields)


@pytest.mark.parametrize(
    "field",
    ["selector=typical", "selector=target_nll", "oversample=1", "keep_language=null"],
)
def test_what_was_removed_is_refused_with_the_reason(field) -> None:
    name, value = field.split("=")
    sentence = rf"FAQModifier's {name}(: {value})? was removed: .+; (use|leave) .+\."
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        options_of({}, [field])
    with pytest.raises(ValidationError, match=sentence):
        FAQModifier(**{name: yaml.safe_load(value)})


def test_the_cache_folder_follows_field_then_variable(monkeypatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/somewhere")
    assert FAQModifier(cache_dir="here").store_folder() == "here"
    assert FAQModifier().store_folder() == "/somewhere/faq"
    monkeypatch.delenv(CACHE_VARIABLE)
    assert FAQModifier().store_folder() == "~/.cache/llmc_faq_slider/faq"


def test_rows_are_cut_to_the_context(small_model, tmp_path) -> None:
    class Model:
        config = AutoConfig.from_pretrained(small_model)

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    source = sibling_source(str(small_model), Model.config, tokenizer, 1)
    Model.config.max_position_embeddings = 100
    settings = FAQModifier(sequence_length=512).settings(Model.config, source)
    assert settings.sequence_length == 100


def test_a_model_that_takes_no_further_arguments_gets_no_mask() -> None:
    class Strict(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return input_ids

    class Open(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            return input_ids

    assert not takes_loss_mask(Strict()) and takes_loss_mask(Open())
    ids, mask = torch.arange(6).view(2, 3), torch.tensor([[0, 1, 1], [0, 0, 1]])
    first = next(iter(rows_loader(ids, mask.to(torch.uint8))))
    assert first["loss_mask"].tolist() == [[0, 1, 1]]
    assert first["loss_mask"].dtype == torch.int64
    assert "loss_mask" not in next(iter(rows_loader(ids)))
