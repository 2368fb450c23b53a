"""Losses over many rows, a piece that fits in memory at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from llmc_faq_slider.slider.loss import CountedTokens, judged_rows
from llmc_faq_slider.slider.memory import RowLimit
from llmc_faq_slider.slider.stream import row_batches

__all__ = ["RowLoss", "accumulate_gradients", "judge"]

#: mean loss over the tokens that count in some rows of one length
RowLoss = Callable[[list[int]], Tensor]


def accumulate_gradients(
    row_loss: RowLoss,
    batch: list[int],
    tokens: CountedTokens,
    limit: RowLimit,
    scaler: torch.amp.GradScaler,
    clear: Callable[[], None],
) -> float:
    """
    Mean loss over a batch's tokens that count, its gradients added to what is there.

    :param clear: takes gradients back when memory ran out on the way
    """
    total = tokens.count(batch)

    def gradients() -> float:
        loss = 0.0
        for piece in limit.pieces(batch):
            if share := tokens.count(piece) / total:
                part = row_loss(piece) * share
                scaler.scale(part).backward()
                loss += part.item()
        return loss

    return limit.run(gradients, clear)


@torch.no_grad()
def judge(row_loss: RowLoss, tokens: CountedTokens, limit: RowLimit) -> float:
    """Mean loss over the tokens that count in :func:`judged_rows`."""
    judged = judged_rows(tokens)

    def loss() -> float:
        total = 0.0
        for rows in row_batches(tokens.lengths, limit.rows, judged):
            total += row_loss(rows).item() * tokens.count(rows)
        return total / tokens.count(judged)

    return limit.run(loss)
