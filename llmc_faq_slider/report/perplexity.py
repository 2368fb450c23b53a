"""How far a causal language model predicts a text, and how far two models differ."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmc_faq_slider.products import multiplied_in, product_dtype

__all__ = ["loss_and_divergence", "next_token_loss", "perplexity"]


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    sequence_length: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 8,
) -> float:
    """Returns exp of the mean negative log-likelihood per predicted token.

    The text is cut into rows of ``sequence_length`` tokens that do not overlap; a rest
    shorter than a row is left out, and every row predicts all its tokens but the first.
    Figures can be compared only at the same ``sequence_length`` and ``max_tokens``.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    ids = ids[:max_tokens]
    count = len(ids) // sequence_length
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than one row of {sequence_length}"
        )
    rows = ids[: count * sequence_length].view(count, sequence_length)
    return math.exp(next_token_loss(model, rows, batch_size))


@torch.inference_mode()
def next_token_loss(model: PreTrainedModel, rows: Tensor, batch_size: int = 8) -> float:
    """Returns the mean negative log-likelihood, in nats, of all tokens but the first.

    :param rows: token ids ``[rows, length]``, without padding
    """
    total = 0.0
    for batch, logits in _row_logits(model, rows, batch_size):
        scores = logits.log_softmax(dim=-1)
        total -= scores.gather(1, batch[1:, None]).double().sum().item()
    return total / rows[:, 1:].numel()


@torch.inference_mode()
def loss_and_divergence(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    rows: Tensor,
    batch_size: int = 8,
) -> tuple[float, float]:
    """
    Returns :func:`next_token_loss` of the model, and KL(reference || model) of the
    next-token distribution, mean in nats, from one pass of each.

    :param rows: token ids ``[rows, length]``, without padding
    """
    loss = divergence = 0.0
    pairs = zip(
        _row_logits(reference, rows, batch_size),
        _row_logits(model, rows, batch_size),
        strict=True,
    )
    for (row, expected), (_, found) in pairs:
        expected, found = expected.log_softmax(-1), found.log_softmax(-1)
        difference = (expected.exp() * (expected - found)).sum(-1)
        divergence += difference.double().sum().item()
        loss -= found.gather(1, row[1:, None]).double().sum().item()
    tokens = rows[:, 1:].numel()
    return loss / tokens, divergence / tokens


def _row_logits(
    model: PreTrainedModel, rows: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every row's token ids and its fp32 logits ``[length - 1, vocabulary]``."""
    was_training = model.training
    model.eval()
    try:
        for batch in rows.split(batch_size):
            batch = batch.to(model.device)
            with multiplied_in(product_dtype("auto", batch.device), batch.device):
                logits = model(input_ids=batch, use_cache=False).logits
            # One row at a time: a batch of fp32 logits is gigabytes for large
            # vocabularies.
            for row, row_logits in zip(batch, logits, strict=True):
                yield row, row_logits[:-1].float()
    finally:
        model.train(was_training)
