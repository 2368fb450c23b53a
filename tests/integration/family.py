"""What the integration tests share: data, perplexity and runs on the tiny family."""

import math
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    PreTrainedModel,
)

import llmc_faq_slider
from llmc_faq_slider.report.perplexity import next_token_loss as loss

TESTS = Path(__file__).parents[1]
RECIPES = TESTS.parent / "recipes"
LENGTH = 128
# Its linears are of a class of their own.
FALCON = FalconConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    alibi=False,
    new_decoder_architecture=True,
    num_kv_heads=2,
)


def held_out_rows(model: Path, half: int) -> Tensor:
    """Rows of held-out text; half 0 is for calibration, half 1 for evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for path in sorted((TESTS / "data" / "heldout").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        middle = len(text) // 2
        text = text[:middle] if half == 0 else text[middle:]
        ids += tokenizer(text[:16_000])["input_ids"]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[shuffled]


def calibration_set(model: Path, rows: int = 32, length: int = LENGTH) -> Dataset:
    ids = held_out_rows(model, half=0).flatten()[: rows * length]
    lists = ids.view(rows, length).tolist()
    return Dataset.from_dict(
        {"input_ids": lists, "attention_mask": [[1] * length for _ in lists]}
    )


def perplexity(model: nn.Module, rows: Tensor) -> float:
    return math.exp(loss(model, rows))


def load(path: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def quantize(model: PreTrainedModel, recipe: object, **arguments: object) -> None:
    """``oneshot`` as a user calls it; rows are not truncated or shuffled."""
    llmc_faq_slider.oneshot(model=model, recipe=recipe, **arguments)


@torch.no_grad()
def logits(model: nn.Module, rows: Tensor) -> Tensor:
    return model(input_ids=rows).logits
