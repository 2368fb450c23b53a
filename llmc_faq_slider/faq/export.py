"""A regenerated data set as files for other tools, and back again."""

import json
import shutil
from pathlib import Path

import torch
from datasets import Dataset

from llmc_faq_slider.faq.store import DATA, MANIFEST, MESSAGES, CalibrationSet

ARROW = "arrow"
_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: {arrow}/data-*.arrow
---

# Calibration data

{rows} rows of {length} tokens, made of {samples} samples.

- `{arrow}/`: the rows, `input_ids`, `attention_mask`, `loss_mask` (1 on answers), for
  `datasets.load_from_disk` or, by way of this folder, `datasets.load_dataset`
- `{data}`: the same ids (int32) and mask (uint8) as two tensors [rows, tokens]
- `{messages}`: the samples as `messages` and, rendered with the chat template, as
  `text`; tokenise the latter without adding special tokens
- `{manifest}`: what made them
"""


def export(found: CalibrationSet, folder: Path) -> None:
    """Write a data set for other tools.

    :raises FileExistsError: when the folder holds anything but an earlier export
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not is_export(folder):
        raise FileExistsError(
            f"{folder} holds other files; name a new or an empty folder to write to"
        )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / ARROW, ignore_errors=True)
    rows, length = found.input_ids.shape
    as_dataset(found.input_ids, found.loss_mask).save_to_disk(folder / ARROW)
    for name in (DATA, MESSAGES, MANIFEST):
        shutil.copyfile(found.folder / name, folder / name)
    card = _CARD.format(
        rows=rows,
        length=length,
        samples=found.manifest["counts"]["selected"],
        arrow=ARROW,
        data=DATA,
        messages=MESSAGES,
        manifest=MANIFEST,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def as_dataset(input_ids: torch.Tensor, loss_mask: torch.Tensor) -> Dataset:
    """Rows with ``input_ids``, ``attention_mask`` of ones and ``loss_mask``."""
    return Dataset.from_dict(
        {
            "input_ids": input_ids.tolist(),
            "attention_mask": torch.ones_like(input_ids).tolist(),
            "loss_mask": loss_mask.tolist(),
        }
    )


def is_export(folder: str | Path) -> bool:
    """Whether :func:`export` wrote a folder."""
    try:
        content = (Path(folder).expanduser() / MANIFEST).read_text(encoding="utf-8")
        return "answer_tokens" in json.loads(content)
    except (OSError, ValueError):
        return False


def load_export(folder: str | Path) -> Dataset:
    """The rows of a folder that :func:`export` wrote.

    :raises ValueError: when its rows are missing
    """
    path = Path(folder).expanduser()
    try:
        return Dataset.load_from_disk(path / ARROW)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has a manifest and no readable rows ({error}); write it again"
        ) from error
