"""What must hold of calibration rows before a model is run on them."""

from collections.abc import Sequence
from typing import Any

from loguru import logger
from torch import Tensor, nn

from llmc_faq_slider.context import context_length

__all__ = ["check_rows"]

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
