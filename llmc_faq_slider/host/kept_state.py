"""What a stage has learned, kept when its end fails, and taken up by another run.

With ``checkpoint_dir`` a state is there already. Without, what was written into the
model is saved: its quantised layers as they stand, about the size of the model.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from llmc_faq_slider.files import cache_folder
from llmc_faq_slider.host.commit import LayerCommits
from llmc_faq_slider.slider.checkpoint import Checkpoint, open_checkpoint
from llmc_faq_slider.slider.closing import ClosingResult
from llmc_faq_slider.slider.learner import Learned, WindowResult
from llmc_faq_slider.slider.windows import Window

__all__ = ["holds_committed", "keep", "take_up"]

COMMITTED = "committed"


def keep(
    folder: Path | None,
    position: int,
    fingerprint: Mapping[str, Any],
    commits: LayerCommits,
    learned: Learned,
    closing: ClosingResult | None,
    change: str,
) -> str:
    """
    Save what was learned, unless the stage's own folder holds it.

    :param folder: of the stage, None if it has none
    :param position: of the stage among those of its class
    :param change: field with which the same run ends well
    :return: a sentence on where it is and how to go on
    """
    if folder is None:
        digest = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()
        folder = cache_folder("unfinished") / digest[:12] / f"slider-{position}"
        try:
            with open_checkpoint(folder, fingerprint) as saved:
                _save(saved, commits, learned, closing)
        except (OSError, RuntimeError) as error:
            return f"What was learned could not be saved: {error}"
    return (
        f"What was learned is in {folder.parent}. Run the same again with "
        f"checkpoint_dir: {folder.parent} and {change} to go on from there."
    )


@torch.no_grad()
def _save(
    saved: Checkpoint,
    commits: LayerCommits,
    learned: Learned,
    closing: ClosingResult | None,
) -> None:
    for index in commits.touched:
        saved.save({}, {_role(index): commits.tensors(index)})
    record = {
        "results": [asdict(result) for result in learned.windows],
        "fold_errors": learned.fold_errors,
        "closing": None if closing is None else asdict(closing),
        "layers": [*commits.touched],
    }
    saved.save({COMMITTED: record}, {})


def holds_committed(saved: Checkpoint | None) -> bool:
    """Whether a state is one that :func:`keep` saved."""
    return saved is not None and COMMITTED in (saved.progress or {})


@torch.no_grad()
def take_up(
    saved: Checkpoint, commits: LayerCommits, outputs: list[Tensor]
) -> tuple[Learned, ClosingResult | None]:
    """
    Write into the model what a state holds.

    :param outputs: full-precision output of the last layer per row
    """
    assert saved.progress is not None
    logger.info(f"SliderQuant: going on from {saved.folder}, all windows finished")
    record = saved.progress[COMMITTED]
    for index in record["layers"]:
        commits.restore(index, saved.tensors(_role(index)))
    results = [
        WindowResult(**(result | {"window": Window(**result["window"])}))
        for result in record["results"]
    ]
    errors = {int(index): error for index, error in record["fold_errors"].items()}
    closing = record["closing"]
    return (
        Learned(results, outputs, errors),
        None if closing is None else ClosingResult(**closing),
    )


def _role(index: int) -> str:
    return f"committed-{index:04d}"
