"""Finds in a transformers model what SliderQuant works on.

Private upstream API: ``PreTrainedModel._no_split_modules`` (class names of decoder
layers), read through llm-compressor's ``infer_sequential_targets``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from torch import Tensor, nn

__all__ = ["calibration_rows", "decoder_layers", "split_targets"]


def decoder_layers(
    model: nn.Module, sequential_targets: str | list[str] | None = None
) -> list[tuple[str, nn.Module]]:
    """
    Name and module of every decoder layer, in order.

    :param sequential_targets: class names given to ``oneshot``, None for the model's
    :raises ValueError: if the model names no decoder layers
    """
    classes = infer_sequential_targets(model, sequential_targets)
    classes = {classes} if isinstance(classes, str) else set(classes)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ in classes
    ]
    if not layers:
        raise ValueError(
            f"SliderQuant found no decoder layers in {type(model).__name__}: no module "
            f"is of class {', '.join(sorted(classes))}. Name the decoder layer class "
            'with oneshot(sequential_targets=["..."]).'
        )
    return layers


def split_targets(
    layers: list[tuple[str, nn.Module]], targets: Mapping[str, nn.Module]
) -> tuple[dict[int, dict[str, nn.Module]], list[str]]:
    """
    Targeted modules by layer index and name within the layer, and those outside.

    :param targets: targeted modules by their name in the model
    """
    inside: dict[int, dict[str, nn.Module]] = {}
    outside = []
    prefixes = {f"{name}.": index for index, (name, _) in enumerate(layers)}
    for name, module in targets.items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            outside.append(name)
        else:
            inside.setdefault(prefixes[prefix], {})[name[len(prefix) :]] = module
    return inside, outside


def calibration_rows(batches: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """
    Token ids of every calibration sample, without padding.

    :param batches: what a calibration DataLoader yields: ``input_ids`` int64
        ``[batch, length]`` and optionally ``attention_mask``
    :return: one int64 tensor ``[tokens]`` per sample of at least two tokens, in an
        order that does not depend on the loader's shuffling
    :raises ValueError: if batches hold no token ids or no sample is usable
    """
    rows: list[Tensor] = []
    for batch in batches:
        if "input_ids" not in batch:
            raise ValueError(
                "SliderQuant calibrates on token ids, but the calibration data has "
                f"only the columns {sorted(batch)}. Give oneshot a text data set, or "
                "rows with an input_ids column."
            )
        ids = torch.as_tensor(batch["input_ids"])
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"The calibration data's input_ids are {str(ids.dtype)[6:]} numbers, "
                "and token ids are whole. Tokenise the data again."
            )
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
        for sample, valid in zip(ids, mask, strict=True):
            tokens = sample[valid.bool()]
            if len(tokens) > 1:
                rows.append(tokens)
    if not rows:
        raise ValueError(
            "The calibration data holds no sample of two tokens or more. Give oneshot "
            "a data set, or put a FAQModifier before SliderQuantModifier."
        )
    return sorted(rows, key=lambda row: row.tolist())
