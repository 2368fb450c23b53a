"""A mixture of experts one of which no token is sent to. Random weights: plumbing."""

import json

import pytest
import torch
from datasets import Dataset
from family import load, quantize
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llmc_faq_slider import SliderQuantModifier
from llmc_faq_slider.host.run_report import RUN_REPORT

pytestmark = pytest.mark.integration

CONFIG = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=128,
    moe_intermediate_size=128,
    num_experts=4,
    num_experts_per_tok=1,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
)


@pytest.fixture
def source(small_model, tmp_path):
    model = Qwen3MoeForCausalLM(CONFIG)
    with torch.no_grad():
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.mlp.gate.weight)
        # The mean of three logits is never the largest of four.
        router = model.model.layers[1].mlp.gate.weight
        router[3] = router[:3].mean(0)
    model.save_pretrained(tmp_path / "source")
    # oneshot asks for a tokenizer, though these rows need none.
    AutoTokenizer.from_pretrained(small_model).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_an_expert_without_tokens_is_rounded_and_reported(source, tmp_path):
    rows = torch.randint(0, 256, (16, 64)).tolist()
    output = tmp_path / "quantized"
    stage = SliderQuantModifier(
        ignore=["lm_head", "re:.*mlp.gate$"],
        scheme="W8A16",
        epochs=1,
        closing_epochs=0,
    )
    quantize(
        load(source, torch.float32),
        stage,
        dataset=Dataset.from_dict({"input_ids": rows}),
        output_dir=str(output),
    )
    (record,) = json.loads((output / RUN_REPORT).read_text())["stages"]
    idle = record["idle"]
    assert (idle["linears"], idle["experts"], idle["all_experts"]) == (3, 1, 8)
    # of 8 experts beside the attention of two layers
    assert 0.05 < idle["share_of_weights"] < 1 / 8
    assert idle["tokens_for_all"] > 16 * 64
    (sentence,) = [one for one in stage.warnings if "experts" in one]
    assert sentence in record["warnings"]
    assert "1 of 8 experts" in sentence and "none of the 1024 calibration" in sentence
    assert (output / "model.safetensors").is_file()
