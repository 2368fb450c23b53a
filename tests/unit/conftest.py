"""What several unit tests ask for: warnings, and a decoder to learn on."""

from collections.abc import Iterator

import pytest
import torch
from loguru import logger
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config


@pytest.fixture
def model() -> PreTrainedModel:
    """Five random layers: enough for arithmetic and bookkeeping."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Warnings as they are logged."""
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)
