"""The folder that oneshot writes holds the model that was quantised."""

import json

import pytest
import torch
from datasets import Dataset
from family import FALCON, load, logits, quantize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from llmc_faq_slider import SliderQuantModifier

pytestmark = pytest.mark.integration

ROWS = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0))
DATA = Dataset.from_dict({"input_ids": ROWS.tolist()})
GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}


def stage() -> SliderQuantModifier:
    groups = {"targets": ["Linear"], "weights": GROUP | {"group_size": 32}}
    return SliderQuantModifier(
        ignore=["lm_head"], preset="fast", config_groups={"group_0": groups}
    )


def scaled(path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, rope_parameters=rope
    ).eval()


def grown(path):
    model = load(path)
    model.resize_token_embeddings(3136)
    return model


@pytest.mark.parametrize(
    ("make", "field"), [(scaled, "rope_parameters"), (grown, "vocab_size")]
)
def test_what_was_changed_in_memory_is_saved(make, field, small_model, tmp_path):
    model = make(small_model)
    quantize(model, stage(), dataset=DATA, output_dir=str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert getattr(again.config, field) == getattr(model.config, field)
    torch.testing.assert_close(logits(again, ROWS), logits(model, ROWS))


def test_an_unchanged_config_stays_the_source_folders(small_model, tmp_path):
    quantize(load(small_model), stage(), dataset=DATA, output_dir=str(tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    del written["quantization_config"]
    assert written == json.loads((small_model / "config.json").read_text())


def test_generation_config_and_tokenizer_are_those_given(small_model, tmp_path):
    model = load(small_model)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=7, eos_token_id=2
    )
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    quantize(
        model, stage(), dataset=DATA, tokenizer=tokenizer, output_dir=str(tmp_path)
    )
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.temperature, saved.top_k) == (0.3, 7)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.chat_template == tokenizer.chat_template


def test_what_was_left_out_beside_linears_of_another_class_is_ignored(
    tmp_path, small_model
):
    AutoModelForCausalLM.from_config(FALCON).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    quantize(
        model,
        stage(),
        dataset=DATA,
        tokenizer=AutoTokenizer.from_pretrained(small_model),
        output_dir=str(tmp_path / "out"),
    )
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["quantization_config"]["ignore"] == ["lm_head"]


def test_a_model_object_is_quantised_once(small_model):
    model = load(small_model)
    quantize(model, stage(), dataset=DATA)
    before = logits(model, ROWS)
    with pytest.raises(ValueError, match="was quantised before: 56 of its layers"):
        quantize(model, stage(), dataset=DATA)
    assert torch.equal(logits(model, ROWS), before)
