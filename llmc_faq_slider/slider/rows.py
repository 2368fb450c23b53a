"""What must hold of calibration rows before a model is run on them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from llmc_faq_slider.context import context_length

__all__ = ["check_rows", "idle_experts", "warn_of_idle_experts"]

#: equal tokens at the end of a row that no text ends with
PADDING_RUN = 8
#: tokens below which learned scales follow the few rows more than the model
FEW_TOKENS = 1024


def check_rows(model: nn.Module, rows: Sequence[Tensor]) -> None:
    """
    Refuse rows that the model cannot read; warn of few tokens, of padding that counts
    as text, and of texts that begin twice.

    :param model: a transformers model
    :param rows: integer token ids ``[length]`` without padding
    :raises ValueError: for ids outside the vocabulary, and rows longer than the context
    """
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    lowest = min(int(row.min()) for row in rows)
    highest = max(int(row.max()) for row in rows)
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"The calibration data holds the token id {wrong}, and the model's "
            f"vocabulary has {vocabulary} ids, from 0. Tokenise the data with the "
            "tokenizer of this model."
        )
    context = context_length(model.config)
    longest = max(map(len, rows))
    if context is not None and longest > context:
        raise ValueError(
            f"The calibration data has a sample of {longest} tokens, and the model's "
            f"context is {context}. Cut the samples: give oneshot "
            f"max_seq_length={context} or less for text, or shorter rows."
        )
    _warn_of_padding(model, rows)
    _warn_of_two_beginnings(model, rows)
    tokens = sum(map(len, rows))
    if tokens < FEW_TOKENS:
        logger.warning(
            f"The calibration data holds {tokens} tokens, too few to learn from. Give "
            "some ten thousand, or put a FAQModifier first."
        )


def _warn_of_padding(model: nn.Module, rows: Sequence[Tensor]) -> None:
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    padding = {getattr(config, "pad_token_id", None), *_ids(config, "eos_token_id")}
    padded = 0
    for row in rows:
        for end in (row, row.flip(0)):
            run = int((end.flip(0) == end[-1]).long().cumprod(0).sum())
            few = 2 if int(end[-1]) in padding else PADDING_RUN
            if few <= run < len(row):
                padded += 1
                break
    if padded:
        logger.warning(
            f"{padded} of {len(rows)} calibration rows begin or end in a run of one "
            "token and have no attention_mask there: this padding is learned as if it "
            "were text. Give the rows an attention_mask, or no padding."
        )


def _warn_of_two_beginnings(model: nn.Module, rows: Sequence[Tensor]) -> None:
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    begins = _ids(config, "bos_token_id")
    twice = sum(int(row[0]) in begins and int(row[1]) == int(row[0]) for row in rows)
    if twice:
        logger.warning(
            f"{twice} of {len(rows)} calibration rows begin with the beginning-of-text "
            "token twice, which the model never sees when it is served. A chat "
            "template that writes it wants add_special_tokens=False in the tokenizer."
        )


def _ids(config: Any, name: str) -> list[int]:
    found = getattr(config, name, None)
    return [found] if isinstance(found, int) else list(found or [])


@torch.no_grad()
def idle_experts(
    model: nn.Module, rows: Sequence[Tensor], device: torch.device
) -> dict[str, tuple[int, int]]:
    """
    Experts that no token of the rows is sent to.

    :return: by name of the router, how many experts get none, and how many there are
    """
    seen: dict[str, Tensor] = {}
    with _watched_routers(model, seen):
        if not seen:
            return {}
        for row in rows:
            model(input_ids=row.unsqueeze(0).to(device), use_cache=False)
    idle = {
        name: (int((count == 0).sum()), len(count))
        for name, count in seen.items()
        # routers that tell their choice in another form count nothing
        if count.sum()
    }
    return {name: found for name, found in idle.items() if found[0]}


def warn_of_idle_experts(
    model: nn.Module, rows: Sequence[Tensor], device: torch.device
) -> None:
    """Say how many experts no calibration token reaches; nothing is learned there."""
    idle = idle_experts(model, rows, device)
    if idle:
        name, (missing, experts) = max(idle.items(), key=lambda item: item[1][0])
        logger.warning(
            f"{sum(number for number, _ in idle.values())} experts get no token of the "
            f"calibration data and are rounded without learning, most of them behind "
            f"{name} ({missing} of {experts}). Give more or more varied data."
        )


@contextmanager
def _watched_routers(model: nn.Module, seen: dict[str, Tensor]) -> Iterator[None]:
    """Count in ``seen`` how many tokens each router sends to each expert.

    transformers' routers return logits, weights and the chosen experts' numbers.
    """
    handles = []
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("Router"):
            continue
        experts = getattr(module, "num_experts", None)
        if not isinstance(experts, int):
            continue
        seen[name] = torch.zeros(experts, dtype=torch.int64)

        def count(
            _module: nn.Module, _args: Any, output: Any, name: str = name
        ) -> None:
            chosen = output[-1] if isinstance(output, tuple) else None
            if isinstance(chosen, Tensor) and not chosen.is_floating_point():
                numbers = chosen.flatten().cpu()
                seen[name] += torch.bincount(numbers, minlength=len(seen[name]))

        handles.append(module.register_forward_hook(count))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
