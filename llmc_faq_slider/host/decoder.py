"""Finds in a transformers model what SliderQuant works on.

Private upstream API: ``PreTrainedModel._no_split_modules`` (class names of decoder
layers), read through llm-compressor's ``infer_sequential_targets``, and
``llmcompressor.modeling.moe.context._CALIBRATE_ALL_EXPERTS``.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe import context
from llmcompressor.utils.helpers import DisableQuantization
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from loguru import logger
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmc_faq_slider.slider.head import frozen
from llmc_faq_slider.slider.loss import CountedTokens

__all__ = [
    "calibration_rows",
    "calibration_samples",
    "counted_tokens",
    "decoder_layers",
    "split_targets",
    "unquantized",
]


def decoder_layers(
    model: nn.Module, sequential_targets: str | list[str] | None = None
) -> list[tuple[str, nn.Module]]:
    """
    Name and module of every decoder layer, in order; of a model that sees or hears as
    well, those of its language model.

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
    if isinstance(model, PreTrainedModel):
        language = set(model.get_decoder().modules())
        layers = [one for one in layers if one[1] in language] or layers
    inner = {m for _, layer in layers for m in layer.modules() if m is not layer}
    return [one for one in layers if one[1] not in inner]


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
    """Token ids of every calibration sample: :func:`calibration_samples`."""
    return calibration_samples(batches)[0]


def calibration_samples(
    batches: Iterable[Mapping[str, Any]],
) -> tuple[list[Tensor], list[Tensor | None]]:
    """
    Token ids and loss mask of every calibration sample, without padding.

    :param batches: what a calibration DataLoader yields: ``input_ids`` int64
        ``[batch, length]``, optionally ``attention_mask`` and ``loss_mask`` alike
    :return: one int64 tensor ``[tokens]`` per sample of at least two tokens, in an
        order that does not depend on the loader's shuffling, and bool ``[1, tokens]``
        or None per sample that has no loss mask
    :raises ValueError: if batches hold no token ids or no sample is usable
    """
    found: list[tuple[Tensor, Tensor | None]] = []
    short = 0
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
        valid = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
        counted = batch.get("loss_mask")
        for number, (sample, real) in enumerate(zip(ids, valid.bool(), strict=True)):
            tokens = sample[real]
            if len(tokens) < 2:
                short += 1
                continue
            counts = None
            if counted is not None:
                counts = torch.as_tensor(counted)[number][real].bool().unsqueeze(0)
            found.append((tokens, counts))
    if not found:
        raise ValueError(
            "The calibration data holds no sample of two tokens or more. Give oneshot "
            "a data set, or put a FAQModifier before SliderQuantModifier."
        )
    if short:
        logger.warning(
            f"SliderQuant leaves out {short} of {len(found) + short} calibration "
            "samples: they have fewer than two tokens."
        )
    found.sort(
        key=lambda row: (row[0].tolist(), [] if row[1] is None else row[1].tolist())
    )
    return [tokens for tokens, _ in found], [counts for _, counts in found]


def counted_tokens(rows: list[Tensor], masks: list[Tensor | None]) -> CountedTokens:
    """
    Tokens whose errors count, by the loss masks; all of a row that has none.

    :raises ValueError: if no token is left
    """
    tokens = CountedTokens([len(row) for row in rows], masks)
    if not tokens.count([*range(len(rows))]):
        raise ValueError(
            f"loss_on_responses is set, but the loss masks of all {len(rows)} "
            "calibration rows are zero. Give rows with responses, or leave "
            "loss_on_responses out."
        )
    if all(mask is None for mask in masks):
        logger.warning(
            "loss_on_responses is set, but the calibration data has no loss_mask: all "
            "tokens count."
        )
    return tokens


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """
    The model evaluates its plain weights, which collect no gradients.

    Experts get the tokens that are sent to them, whatever ``oneshot`` says in
    ``moe_calibrate_all_experts``: what others do in them changes no loss, and would
    hide experts that learn nothing.
    """
    training = model.training
    routed = patch_attr(context, "_CALIBRATE_ALL_EXPERTS", False)
    model.eval()
    try:
        with DisableQuantization(model), frozen(model), routed:
            yield
    finally:
        model.train(training)
