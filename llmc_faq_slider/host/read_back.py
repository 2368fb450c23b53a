"""Reads a checkpoint back as transformers does, without its weights.

Upstream's writers and readers do not always mean the same tensor by a name, and what a
reader does not find it starts at random, with a line in its log. So a run ends with the
reading of the file headers: seconds at any size.

Private upstream API: ``transformers.conversion_mapping``'s cache, which llm-compressor
changes for the whole process while it loads experts one by one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from loguru import logger
from torch import nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.utils import logging

from llmc_faq_slider.host.saved_config import config_differences

__all__ = ["read_back"]

_READER = f"transformers {transformers.__version__}"
SHOWN = 3


def read_back(folder: Path, model: PreTrainedModel) -> list[str]:
    """
    Sentences on what differs from the model when its checkpoint is read; logged too.

    :param folder: that of the checkpoint
    :param model: the model that was saved there
    """
    try:
        said = _differences(folder, model)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        said = [
            f"{_READER} cannot read {folder} back ({type(error).__name__}: {reason}). "
            "vLLM has readers of its own."
        ]
    for sentence in said:
        logger.warning(sentence)
    return said


def _differences(folder: Path, model: PreTrainedModel) -> list[str]:
    with _own_conversions(), _quiet():
        read, info = type(model).from_pretrained(
            folder, device_map="meta", output_loading_info=True, local_files_only=True
        )
    said = []
    if info["missing_keys"]:
        said.append(
            f"{_READER} does not find {_named(info['missing_keys'])} in {folder} and "
            "would start them at random. Do not load this checkpoint with it. vLLM "
            "has readers of its own, which do not check that a quantised model is "
            "whole: compare its answers before you serve it."
        )
    lost = [key for key in info["unexpected_keys"] if _is_expert_zero_point(key)]
    if lost:
        said.append(
            f"{_READER} cannot read zero points of experts ({_named(lost)}) in "
            f"{folder}. Quantise experts symmetrically if it has to read them."
        )
    elif info["unexpected_keys"]:
        said.append(
            f"{_READER} leaves out {_named(info['unexpected_keys'])} of {folder}."
        )
    changed = config_differences(folder, model)
    if changed:
        said.append(
            f"config.json in {folder} says otherwise than the model about "
            f"{', '.join(sorted(changed))}. Correct these fields there."
        )
    return said + _other_formats(read, model)


def _other_formats(read: nn.Module, model: nn.Module) -> list[str]:
    """On modules that are quantised otherwise when read; fused experts are none."""
    theirs, ours = _formats(read), _formats(model)
    there = {name for name, _ in read.named_modules()}
    other = sorted(
        name
        for name in theirs.keys() | (ours.keys() & there)
        if theirs.get(name) != ours.get(name)
    )
    said = []
    if other:
        said.append(
            f"{_READER} takes {_named(other)} for quantised otherwise than they are."
        )
    if any(ours[name][1] is not None for name in ours.keys() - there):
        said.append(
            f"{_READER} fuses the experts and leaves their inputs unquantised; vLLM "
            "quantises them as they were learned."
        )
    return said


def _formats(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Number formats of weights and inputs, by name of module."""
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if isinstance(scheme, QuantizationScheme):
            found[name] = (_format(scheme.weights), _format(scheme.input_activations))
    return found


def _format(args: QuantizationArgs | None) -> tuple[Any, ...] | None:
    if args is None:
        return None
    return args.num_bits, args.type, args.strategy, args.group_size, args.symmetric


def _is_expert_zero_point(key: str) -> bool:
    return ".experts." in key and key.endswith("zero_point")


def _named(names: Sequence[str]) -> str:
    shown = sorted(map(str, names))[:SHOWN]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(shown)}{more}"


@contextmanager
def _own_conversions() -> Iterator[None]:
    """transformers' renamings as a process has them that loads only this folder."""
    changed: Any = conversion_mapping
    before = changed._checkpoint_conversion_mapping_cache
    changed._checkpoint_conversion_mapping_cache = None
    try:
        yield
    finally:
        changed._checkpoint_conversion_mapping_cache = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of readers, and none of their reports: ours says more."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
