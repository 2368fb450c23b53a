"""Perplexity of a causal language model on a plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    was_training = model.training
    model.eval()
    try:
        total = sum(_losses(model, rows, batch_size))
    finally:
        model.train(was_training)
    return math.exp(total / (count * (sequence_length - 1)))


@torch.inference_mode()
def _losses(
    model: PreTrainedModel, rows: torch.Tensor, batch_size: int
) -> Iterator[float]:
    """Yields the summed negative log-likelihood of every row."""
    for batch in rows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits
        # Row by row: a whole batch of fp32 logits is gigabytes at large vocabularies.
        for row, row_logits in zip(batch, logits, strict=True):
            scores = row_logits[:-1].float().log_softmax(dim=-1)
            yield -scores.gather(1, row[1:, None]).double().sum().item()
