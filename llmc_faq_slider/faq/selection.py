"""Group competition: the valid candidates of a prompt from best to worst."""

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
    :param truncated: cut off at the token limit, or lacking turns of a chat
    :param score: what the selector's expert says of it: mean log-probability in nats
        per token, or the judge's grade
    """

    prompt_id: str
    index: int
    num_tokens: int
    truncated: bool
    score: float


def ranked(
    group: Sequence[Contender], selector: Selector, seed: int
) -> list[Contender]:
    """Finished answers first, then by the selector's measure, the best one first.

    Ties go to the shorter answer, then to the lower candidate number.
    """

    def measure(contender: Contender) -> float:
        if selector == "random":
            key = f"{seed}:{contender.prompt_id}:{contender.index}"
            return float(zlib.crc32(key.encode()))
        return contender.score

    return sorted(
        group, key=lambda c: (c.truncated, -measure(c), c.num_tokens, c.index)
    )
