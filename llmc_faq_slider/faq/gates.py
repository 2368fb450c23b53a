"""Validity gates: which candidates may take part in the competition. Ours."""

import zlib
from collections.abc import Collection, Sequence

from llmc_faq_slider.faq.rendering import THINK_CLOSE, THINK_OPEN
from llmc_faq_slider.faq.settings import GateLimits

_NGRAM = 8
_ZLIB_MIN_BYTES = 1000

#: every reason for which a candidate is refused, in the order they are looked at
GATES = (
    "refused",
    "invalid_reply",
    "finish_reason",
    "truncated",
    "too_short",
    "think_unbalanced",
    "control_token",
    "compressible",
    "repetitive",
    "refusal",
    "evaluation_overlap",
    "duplicate",
    "near_duplicate",
)


def failed_gate(
    body_ids: Sequence[int],
    text: str,
    truncated: bool,
    control_ids: Collection[int],
    limits: GateLimits,
    marks: Collection[str] = (),
) -> str | None:
    """Name of the first gate of form a candidate fails, or None if it is valid.

    :param body_ids: answer ids, without the end of turn
    :param text: the same decoded, with special tokens and any opening think tag that
        the prompt wrote
    :param truncated: the answer was cut off at the token limit
    :param control_ids: ids that only a template may place
    :param marks: texts that only a template may place
    """
    if truncated and not limits.accept_truncated:
        return "truncated"
    if len(body_ids) < limits.min_response_tokens:
        return "too_short"
    if not think_balanced(text, truncated):
        return "think_unbalanced"
    if any(index in control_ids for index in body_ids) or any(
        mark in text for mark in marks
    ):
        return "control_token"
    if zlib_ratio(text) > limits.max_zlib_ratio:
        return "compressible"
    if repeated_share(body_ids) > limits.max_repeated_share:
        return "repetitive"
    return None


def think_balanced(text: str, truncated: bool = False) -> bool:
    """No think block, or one that opens before it closes; a cut-off may stay open."""
    opened, closed = text.count(THINK_OPEN), text.count(THINK_CLOSE)
    if (opened, closed) == (0, 0):
        return True
    if (opened, closed) == (1, 1):
        return text.index(THINK_OPEN) < text.index(THINK_CLOSE)
    return truncated and (opened, closed) == (1, 0)


def zlib_ratio(text: str) -> float:
    """Raw bytes over deflated bytes; 0 for texts too short to judge."""
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw)) if len(raw) >= _ZLIB_MIN_BYTES else 0.0


def repeated_share(ids: Sequence[int], n: int = _NGRAM) -> float:
    """Share of ``n``-token runs that already occurred earlier in ``ids``."""
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
