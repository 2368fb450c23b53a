"""What a window lowers, and over which tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmc_faq_slider.slider.head import JUDGED_ROWS

__all__ = ["CountedTokens", "judged_rows", "output_loss", "token_errors"]


@dataclass(frozen=True)
class CountedTokens:
    """
    Tokens whose errors count, by row.

    :param lengths: tokens per row
    :param masks: bool ``[1, length]`` per row; None where all tokens of a row count
    """

    lengths: list[int]
    masks: list[Tensor | None]

    @classmethod
    def all(cls, lengths: list[int]) -> "CountedTokens":
        return cls(lengths, [None] * len(lengths))

    def count(self, rows: list[int]) -> int:
        return sum(
            self.lengths[i] if mask is None else int(mask.sum())
            for i, mask in ((i, self.masks[i]) for i in rows)
        )

    def mask(self, rows: list[int], device: torch.device) -> Tensor | None:
        """bool ``[rows, length]`` for rows of one length, None if all count."""
        if all(self.masks[i] is None for i in rows):
            return None
        whole = torch.ones(1, self.lengths[rows[0]], dtype=torch.bool)
        masks = [self.masks[i] for i in rows]
        return torch.cat([whole if m is None else m for m in masks]).to(device)


def judged_rows(tokens: CountedTokens) -> list[int]:
    """The first rows with tokens that count, at most :data:`JUDGED_ROWS`."""
    counting = [i for i in range(len(tokens.lengths)) if tokens.count([i])]
    return counting[:JUDGED_ROWS]


def output_loss(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """
    Mean error of the tokens that count, of which there must be one.

    :param output: ``[rows, length, hidden]``
    :param mask: bool ``[rows, length]``, None if all count
    """
    errors = token_errors(output, target)
    return errors.mean() if mask is None else errors[mask].mean()


def token_errors(output: Tensor, target: Tensor) -> Tensor:
    """
    Squared error of each token's hidden state, relative to that state's square.

    Departure from eq. (1), which averages plain squared errors: the norm in front of
    every consumer removes a token's magnitude, and the few tokens with massive
    activations would otherwise be all that a deep window learns.

    :param output: ``[rows, length, hidden]``
    :return: fp32 ``[rows, length]``
    """
    target = target.float()
    error = (output.float() - target).square().mean(-1)
    return error / target.square().mean(-1).clamp(min=1e-12)
