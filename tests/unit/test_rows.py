"""Rows that a model cannot read are refused; experts that no row reaches are named."""

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from llmc_faq_slider.slider.rows import check_rows, idle_experts, warn_of_idle_experts

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=1,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        max_position_embeddings=128,
    )
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ([1, 64], "token id 64, and the model's vocabulary has 64 ids"),
        ([-1, 5], "token id -1"),
        ([5] * 129, "sample of 129 tokens, and the model's context is 128"),
    ],
)
def test_rows_that_cannot_be_read(row, sentence, model) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_rows(model, [torch.tensor([1, 2]), torch.tensor(row)])


def test_few_tokens_are_warned_of(model, said) -> None:
    check_rows(model, [torch.tensor([0, 63])])
    assert len(said) == 1 and "holds 2 tokens, too few" in said[0]
    check_rows(model, [torch.full((128,), 7)] * 8)
    assert len(said) == 1


def test_experts_without_tokens_are_counted(model, said) -> None:
    one = [torch.tensor([5])]
    assert idle_experts(model, one, CPU) == {
        f"model.layers.{layer}.mlp.gate": (7, 8) for layer in (0, 1)
    }
    warn_of_idle_experts(model, one, CPU)
    assert "14 experts get no token" in said[0] and "7 of 8" in said[0]
    router = model.model.layers[0].mlp.gate
    with torch.no_grad():
        router.weight.copy_(torch.randn(8, 32))
    before = len(router._forward_hooks)
    many = [torch.randint(0, 64, (128,)) for _ in range(8)]
    assert "model.layers.0.mlp.gate" not in idle_experts(model, many, CPU)
    assert len(router._forward_hooks) == before
