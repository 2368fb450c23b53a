"""What makes one run of a SliderQuant stage the same as another, and where it is kept.

Private upstream API: ``active_session().lifecycle.recipe.modifiers`` (all stages while
they are initialised) and what ``calibration_data`` names.
"""

import hashlib
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from torch import Tensor, nn

from llmc_faq_slider.host.calibration_data import plain_weights
from llmc_faq_slider.slider.windows import Window

__all__ = ["run_fingerprint", "stage_folder", "stage_position", "versions"]

FOLDER_VARIABLE = "LLMC_FAQ_SLIDER_CHECKPOINT_DIR"
PACKAGES = (
    "llmc-faq-slider",
    "llmcompressor",
    "compressed-tensors",
    "torch",
    "transformers",
)
# Fields that do not change what the windows learn: how a run is done, the closing pass,
# which keeps its own with its state, and what only sets other fields.
WITHOUT_EFFECT = {
    "checkpoint_dir",
    "strict",
    "target",
    "index",
    "group",
    "closing_epochs",
    "closing_lr",
    "preset",
}


def stage_position(stage: Modifier) -> int:
    """Number of the stage among those of its class in the recipe, from 1 on."""
    recipe = active_session().lifecycle.recipe
    modifiers = recipe.modifiers if recipe is not None else [stage]
    same = [modifier for modifier in modifiers if type(modifier) is type(stage)]
    return next((n for n, one in enumerate(same, start=1) if one is stage), 1)


def stage_folder(checkpoint_dir: str | None, position: int) -> Path | None:
    """
    Where a stage keeps its state, None if nowhere.

    :param checkpoint_dir: the recipe's; the environment's is used if it is None
    """
    root = checkpoint_dir or os.environ.get(FOLDER_VARIABLE)
    return Path(root).expanduser() / f"slider-{position}" if root else None


def run_fingerprint(
    model: nn.Module,
    stage: QuantizationMixin,
    rows: list[Tensor],
    masks: list[Tensor | None],
    windows: list[Window],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """
    JSON-like facts that must be equal for a run to go on from another's state.

    :param rows: token ids by calibration row
    :param masks: which tokens count, None where all do
    :param dtype: of the student's matrix products
    """
    assert isinstance(stage, Modifier)
    fields = stage.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    return {
        "model": {
            "class": type(model).__name__,
            "config": _config_hash(model),
            "weights": _weights_hash(model),
        },
        "data": {
            "rows": len(rows),
            "tokens": sum(map(len, rows)),
            "ids": _hash(_bytes(row) for row in rows),
            "masks": _hash(b"" if mask is None else _bytes(mask) for mask in masks),
        },
        "recipe": {k: v for k, v in fields.items() if not k.endswith("_")},
        "formats": stage.resolved_config.model_dump(mode="json"),
        "windows": [f"{window.start}-{window.stop - 1}" for window in windows],
        "compute_dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that decide what comes out of a run."""
    return {package: version(package) for package in PACKAGES}


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    with disable_onloading():
        stored = list(plain_weights(model))
    for name, weight in stored:
        digest.update(f"{name}:{weight.dtype}:{tuple(weight.shape)}".encode())
        if weight.device.type == "meta":  # it is on the disk
            module, _, last = name.rpartition(".")
            weight = getattr(model.get_submodule(module), last)
        digest.update(_bytes(weight))
    return digest.hexdigest()


def _config_hash(model: nn.Module) -> str:
    content = model.config.to_json_string(use_diff=False)  # type: ignore
    lines = [line for line in content.splitlines() if "_name_or_path" not in line]
    return _hash(line.encode() for line in lines)


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
