"""Rows that a model cannot read are refused, and doubtful ones are named."""

import pytest
import torch
from transformers import Qwen2Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llmc_faq_slider.context import context_length
from llmc_faq_slider.slider.rows import check_rows

pytestmark = pytest.mark.unit


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


def warnings_of(model, said, rows) -> list[str]:
    said.clear()
    check_rows(model, [torch.tensor(row) for row in rows])
    return [sentence for sentence in said if "too few" not in sentence]


def test_padding_that_counts_as_text_is_warned_of(model, said, monkeypatch) -> None:
    monkeypatch.setattr(model.config, "pad_token_id", 3)
    text = [5, 6, 7, 8]
    (right,) = warnings_of(model, said, [text, [*text, 3, 3], [3, 3, *text]])
    assert "2 of 3 calibration rows" in right and "attention_mask" in right
    (unnamed,) = warnings_of(model, said, [[*text, *[0] * 8]])
    assert "1 of 1 calibration rows" in unnamed
    assert not warnings_of(model, said, [text, [*text, 3], [*text, 0, 0]])


def test_texts_that_begin_twice_are_warned_of(model, said, monkeypatch) -> None:
    monkeypatch.setattr(model.config, "bos_token_id", 1)
    (sentence,) = warnings_of(model, said, [[1, 1, 5, 6], [1, 5, 6], [5, 1, 1, 6]])
    assert "1 of 3 calibration rows" in sentence and "twice" in sentence


def test_scaled_positions_make_a_longer_context() -> None:
    def length(rope: dict | None = None, **fields) -> int | None:
        return context_length(
            Qwen2Config(max_position_embeddings=64, rope_parameters=rope, **fields)
        )

    def yarn(**fields) -> dict:
        return {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0} | fields

    assert length() == 64
    assert length(yarn()) == length(yarn(original_max_position_embeddings=64)) == 256
    # stated already
    assert length(yarn(original_max_position_embeddings=16)) == 64
    assert length({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}) == 128
    assert context_length(object()) is None
