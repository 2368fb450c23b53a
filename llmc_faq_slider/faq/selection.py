"""Group competition: the best of a prompt's valid candidates."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from llmc_faq_slider.faq.settings import Selector


@dataclass(frozen=True)
class Contender:
    """A valid candidate.

    :param prompt_id: the group
    :param index: candidate number inside the group
    :param num_tokens: answer tokens without the end of turn
    :param truncated: cut off at the token limit
    :param score: mean log-probability under the expert, in nats per token
    """

    prompt_id: str
    index: int
    num_tokens: int
    truncated: bool
    score: float


def winner(group: Sequence[Contender], selector: Selector, seed: int) -> Contender:
    """The winner: finished answers first, then the selector's score.

    Ties go to the shorter answer, then to the lower candidate number.
    """

    def rank(c: Contender) -> tuple[bool, float, int, int]:
        return (c.truncated, -_score(c, selector, seed), c.num_tokens, c.index)

    return min(group, key=rank)


def _score(contender: Contender, selector: Selector, seed: int) -> float:
    if selector == "expert_nll":
        return contender.score
    if selector == "longest":
        return float(contender.num_tokens)
    key = f"{seed}:{contender.prompt_id}:{contender.index}"
    return float(zlib.crc32(key.encode()))
