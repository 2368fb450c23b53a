"""A regenerated data set as files for other tools, and back again."""

import hashlib
import shutil
from pathlib import Path

import torch
from datasets import Dataset

from llmc_faq_slider.faq.store import (
    DATA,
    MANIFEST,
    MESSAGES,
    CalibrationSet,
    read_calibration,
)
from llmc_faq_slider.files import exclusive, writing

ARROW = "arrow"
_REMEDY = "name another folder to write to."
_CARD = """\
---
configs:
- config_name: rows-{digest}
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
    rows, length = found.input_ids.shape
    # datasets keeps what it has read by the names of folder and configuration alone.
    digest = hashlib.sha256((found.folder / DATA).read_bytes()).hexdigest()[:16]
    card = _CARD.format(
        digest=digest,
        rows=rows,
        length=length,
        samples=found.manifest["counts"]["selected"],
        arrow=ARROW,
        data=DATA,
        messages=MESSAGES,
        manifest=MANIFEST,
    )
    with writing(folder, _REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder, _REMEDY):
            shutil.rmtree(folder / ARROW, ignore_errors=True)
            as_dataset(found.input_ids, found.loss_mask).save_to_disk(folder / ARROW)
            for name in (DATA, MESSAGES, MANIFEST):
                shutil.copyfile(found.folder / name, folder / name)
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
    path = Path(folder).expanduser()
    return (path / MANIFEST).is_file() and (path / DATA).is_file()


def load_export(folder: str | Path) -> Dataset:
    """The rows of a folder that :func:`export` wrote.

    :raises ValueError: when any of its files is not as it was written
    """
    try:
        found = read_calibration(Path(folder).expanduser())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The calibration data in {folder} cannot be used: {error}. Write it again "
            "with llmc-faq-slider regenerate."
        ) from error
    return as_dataset(found.input_ids, found.loss_mask)
