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


def test_an_expert_without_tokens_fails_the_run_unless_not_strict(source, tmp_path):
    rows = torch.randint(0, 256, (16, 64)).tolist()
    output = tmp_path / "quantized"

    def run(strict):
        stage = SliderQuantModifier(
            ignore=["lm_head", "re:.*mlp.gate$"],
            scheme="W8A16",
            epochs=1,
            closing_epochs=0,
            strict=strict,
        )
        quantize(
            load(source, torch.float32),
            stage,
            dataset=Dataset.from_dict({"input_ids": rows}),
            output_dir=str(output),
        )
        return stage

    expert = r"model\.layers\.1\.mlp\.experts\.3\."
    with pytest.raises(RuntimeError, match=f"reached 3 linears: {expert}"):
        run(strict=True)
    assert not (output / RUN_REPORT).exists()
    stage = run(strict=False)
    (record,) = json.loads((output / RUN_REPORT).read_text())["stages"]
    assert record["warnings"] == stage.warnings
    assert "No calibration token reached 3 linears" in stage.warnings[-1]
    assert (output / "model.safetensors").is_file()
