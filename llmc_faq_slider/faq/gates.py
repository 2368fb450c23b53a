"""Validity gates: which candidates may take part in the competition.

All are ours. Those on what an answer says know words, not meaning.
"""

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from llmc_faq_slider.faq.rendering import THINK_CLOSE, THINK_OPEN
from llmc_faq_slider.faq.settings import GateLimits

_NGRAM = 8
_ZLIB_MIN_BYTES = 1000
#: words of a run that a text must not share with an evaluation set
OVERLAP_WORDS = 13
#: tokens of the runs by which two answers are compared
_RUN = 5
#: characters of an answer in which a refusal shows
_OPENING = 200

_REFUSAL = re.compile(
    r"\b(i(?:'|’)?m (?:sorry|afraid|unable)|i am (?:sorry|afraid|unable|not able)|"
    r"i (?:can(?:'|’)?t|cannot|can not|won(?:'|’)?t|will not|must decline to) "
    r"(?:help|assist|answer|provide|comply|fulfil|do that|discuss|create|write|give)|"
    r"as an ai\b|as a language model|i (?:do not|don(?:'|’)?t) have (?:access|the "
    r"ability)|je (?:suis désolée?|ne peux pas)|es tut mir leid|ich kann (?:ihnen |dir "
    r")?(?:dabei |damit )?nicht|lo siento|no puedo ayudar|desculpe|mi dispiace)"
    r"|抱歉|对不起|我无法|申し訳|죄송",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")

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


def is_refusal(text: str) -> bool:
    """Whether the answer, after any reasoning, opens by declining to answer."""
    said = text.rpartition(THINK_CLOSE)[2].strip()
    return _REFUSAL.search(said[:_OPENING]) is not None


class Evaluation:
    """Texts that calibration data must not repeat.

    :param texts: the evaluation set; texts shorter than 13 words cannot be found again
    """

    def __init__(self, texts: Iterable[str]):
        self._runs = {run for text in texts for run in _word_runs(text)}

    def overlaps(self, text: str) -> bool:
        """Whether a run of 13 words occurs in the evaluation set."""
        return any(run in self._runs for run in _word_runs(text))


class Seen:
    """Finds answers that repeat or resemble those to other prompts.

    :param max_similarity: Jaccard index of the sets of 5-token runs
    """

    def __init__(self, max_similarity: float):
        self._limit = max_similarity
        self._texts: set[str] = set()
        self._holders: dict[int, list[int]] = defaultdict(list)
        self._groups: list[str] = []
        self._sizes: list[int] = []

    def failed(self, group: str, text: str, ids: Sequence[int]) -> str | None:
        """``duplicate``, ``near_duplicate`` or None.

        Answers to one prompt may resemble each other: one of them is taken at most.
        """
        if normalised(text) in self._texts:
            return "duplicate"
        runs = _id_runs(ids)
        common = Counter(h for run in runs for h in self._holders.get(run, ()))
        for holder, shared in common.items():
            similarity = shared / (len(runs) + self._sizes[holder] - shared)
            if self._groups[holder] != group and similarity > self._limit:
                return "near_duplicate"
        return None

    def add(self, group: str, text: str, ids: Sequence[int]) -> None:
        runs = _id_runs(ids)
        self._texts.add(normalised(text))
        for run in runs:
            self._holders[run].append(len(self._groups))
        self._groups.append(group)
        self._sizes.append(len(runs))


def normalised(text: str) -> str:
    """Form in which two answers count as the same."""
    return " ".join(text.casefold().split())


def _word_runs(text: str) -> set[tuple[str, ...]]:
    words = [word.casefold() for word in _WORD.findall(text)]
    return {
        tuple(words[i : i + OVERLAP_WORDS])
        for i in range(len(words) - OVERLAP_WORDS + 1)
    }


def _id_runs(ids: Sequence[int]) -> set[int]:
    return {hash(tuple(ids[i : i + _RUN])) for i in range(len(ids) - _RUN + 1)}
