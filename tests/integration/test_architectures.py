"""``oneshot`` with SliderQuant on every architecture that it promises.

Random weights: this proves plumbing (tracing, folding, saving), not quality.
"""

import pytest
import torch
from datasets import Dataset
from family import load, logits, quantize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmc_faq_slider import SliderQuantModifier

pytestmark = pytest.mark.integration

SIZES = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=16,
    max_position_embeddings=64,
)
ARCHITECTURES = {
    "llama_gqa_untied": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama_mha": LlamaConfig(**SIZES, num_key_value_heads=4),
    "llama_tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2_biases": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3_qk_norms": Qwen3Config(**SIZES, num_key_value_heads=2),
    "mistral_sliding": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16),
    "gemma3": Gemma3TextConfig(
        **SIZES, num_key_value_heads=1, sliding_window=16, sliding_window_pattern=2
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, dtype, small_model, tmp_path):
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(ARCHITECTURES[name]).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in source.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    source.save_pretrained(tmp_path / "source")
    # oneshot asks for a tokenizer, though these rows need none.
    AutoTokenizer.from_pretrained(small_model).save_pretrained(tmp_path / "source")
    rows = torch.randint(0, 256, (6, 32))
    data = Dataset.from_dict({"input_ids": rows.tolist()})

    model = load(tmp_path / "source", dtype)
    full = logits(model, rows)
    stage = SliderQuantModifier(
        ignore=["lm_head"],
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 32,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
        epochs=2,
        batch_size=3,
        compute_dtype=str(dtype).removeprefix("torch."),
    )
    quantize(model, stage, dataset=data, output_dir=str(tmp_path / "quantized"))
    expected = logits(model, rows)
    error = ((expected - full).float().square().mean() / full.float().var()).item()
    assert 0 < error < 0.1
    saved = load(tmp_path / "quantized", dtype)
    assert torch.equal(logits(saved, rows), expected)
    assert {n for n, _ in saved.named_parameters() if n.endswith("bias")} == {
        n for n, _ in source.named_parameters() if n.endswith("bias")
    }
