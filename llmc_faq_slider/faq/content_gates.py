"""Gates that read what a candidate says: refusals, overlap, repetition.

All are ours. They know words, not meaning.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from llmc_faq_slider.faq.rendering import THINK_CLOSE

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
