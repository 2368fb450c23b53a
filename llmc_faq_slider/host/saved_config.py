"""Makes the config.json beside a checkpoint that of the model in memory.

llm-compressor writes the config.json of the folder that the model came from, because
vLLM reads that form best. What was changed in memory is lost with it, and so are
ignored modules of another class than those that were quantised.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressed_tensors.utils import is_match
from loguru import logger
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from llmc_faq_slider.files import write_json

__all__ = ["config_differences", "mend_saved_config"]

# What a save changes by itself, and what tells where a config came from.
_OWN = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}


def mend_saved_config(folder: Path, model: PreTrainedModel) -> None:
    """
    Write into a checkpoint's config.json, and beside it, what the model in memory says.

    :param folder: that of the checkpoint
    :param model: the model that was saved there
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    written = json.loads(path.read_text("utf-8"))
    changed = config_differences(folder, model)
    if changed:
        _merge(written, changed)
        write_json(path, written)
        if config_differences(folder, model):
            # Older names of the same fields stand in the way.
            whole = model.config.to_dict()
            whole.pop("quantization_config", None)
            written = whole | {
                key: written[key] for key in ("quantization_config",) if key in written
            }
            write_json(path, written)
        logger.info(
            f"config.json: {', '.join(sorted(changed))} as in the model in memory, "
            "which differs from the folder that it came from."
        )
    quantized = written.get("quantization_config")
    if quantized is not None and _complete_ignore(quantized, model):
        write_json(path, written)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def config_differences(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """Fields of the model's config that a reader of the folder would get otherwise."""
    return _difference(
        *(
            json.loads(config.to_json_string(use_diff=False))
            for config in (AutoConfig.from_pretrained(str(folder)), model.config)
        )
    )


def _difference(read: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in wanted.items():
        if key in _OWN:
            continue
        other = read.get(key)
        if key.endswith("_config") and isinstance(value, dict):
            inner = _difference(other if isinstance(other, dict) else {}, value)
            if inner:
                found[key] = inner
        elif json.dumps(other, sort_keys=True, default=str) != json.dumps(
            value, sort_keys=True, default=str
        ):
            found[key] = value
    return found


def _merge(written: dict[str, Any], changed: Mapping[str, Any]) -> None:
    for key, value in changed.items():
        if key.endswith("_config") and isinstance(written.get(key), dict):
            _merge(written[key], value)
        else:
            written[key] = value


def _complete_ignore(quantized: dict[str, Any], model: nn.Module) -> bool:
    """Add linears that a reader would take for quantised, and that are not."""
    groups = quantized.get("config_groups", {}).values()
    targets = [target for group in groups for target in group.get("targets", [])]
    ignore = quantized.setdefault("ignore", [])
    missing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and getattr(module, "quantization_scheme", None) is None
        and is_match(name, module, targets, ignore)
    ]
    ignore += missing
    return bool(missing)
