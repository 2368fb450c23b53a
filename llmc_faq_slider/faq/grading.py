"""A score for every valid candidate, from the store or else from an expert."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from loguru import logger
from tqdm import tqdm

from llmc_faq_slider.faq import judging
from llmc_faq_slider.faq.competition import Entrant, Group, RegenerationError
from llmc_faq_slider.faq.experts import Expert, ExpertSource
from llmc_faq_slider.faq.settings import Settings
from llmc_faq_slider.faq.store import ScoreLog, Store, content_key

#: tasks graded between two writes to the disk
_BATCH = 16
_GRADE_TOKENS = 32

#: by task and candidate number
Scores = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Experts:
    """Who may be asked for scores.

    :param expert: the expert of ``expert_nll`` and ``expert_judge``
    :param is_generator: that is the generator, whose scores came with its answers
    """

    expert: ExpertSource | None = None
    is_generator: bool = True

    def asked(self, settings: Settings) -> ExpertSource | None:
        """The expert whose identity decides the data set, if any."""
        told = settings.selector == "expert_nll" and self.is_generator
        return None if told or settings.selector == "random" else self.expert


def grade(
    groups: Sequence[Group],
    settings: Settings,
    experts: Experts,
    store: Store,
    candidate_key: str,
) -> tuple[Scores, int]:
    """Score the candidates of all groups for the selector.

    A group of one is not scored, and neither is one that chance decides.

    :return: scores, and how many groups the judge gave no readable grades for
    :raises RegenerationError: when the selector needs an expert that is not there
    """
    contested = [group for group in groups if len(group.entrants) > 1]
    if settings.selector == "expert_judge":
        return _judged(contested, settings, experts, store, candidate_key)
    if settings.selector == "random":
        return {}, 0
    if experts.is_generator:
        told = _told(contested)
        if told is not None:
            return told, 0
    return _scored(contested, settings, experts, store, candidate_key), 0


def _told(groups: Sequence[Group]) -> Scores | None:
    """What the generator said with its answers, None if it did not always."""
    scores: Scores = {}
    for group in groups:
        for entrant in group.entrants:
            if entrant.score is None:
                return None
            scores[group.task.id, entrant.index] = entrant.score
    return scores


def _scored(
    groups: Sequence[Group],
    settings: Settings,
    experts: Experts,
    store: Store,
    candidate_key: str,
) -> Scores:
    source = _need(experts.expert, settings)
    key = content_key(source.facts | {"what": "mean log-probability"})
    log = store.scores(candidate_key, key)
    with ExitStack() as stack:
        expert: Expert | None = None
        missing = [group for group in groups if not _is_scored(group, log)]
        for start in tqdm(range(0, len(missing), _BATCH), desc="FAQ: scoring"):
            if expert is None:
                expert = stack.enter_context(source.open())
            for group in missing[start : start + _BATCH]:
                # a generator is asked in its own words, any other in the target's
                _score_group(group, expert, experts.is_generator, log)
    return {
        (group.task.id, entrant.index): _of(group, entrant, log)
        for group in groups
        for entrant in group.entrants
    }


def _is_scored(group: Group, log: ScoreLog) -> bool:
    return all(log.get(_name(group, entrant)) for entrant in group.entrants)


def _score_group(group: Group, expert: Expert, own_words: bool, log: ScoreLog) -> None:
    missing = [e for e in group.entrants if log.get(_name(group, e)) is None]
    pairs = [pair for entrant in missing for pair in _pairs(entrant, own_words)]
    means = expert.mean_logprobs([p for p, _ in pairs], [a for _, a in pairs])
    sizes = [len(answer) for _, answer in pairs]
    for entrant in missing:
        count = len(entrant.turns)
        total = sum(m * n for m, n in zip(means[:count], sizes[:count], strict=True))
        log.append(_name(group, entrant), [total / sum(sizes[:count])])
        means, sizes = means[count:], sizes[count:]


def _pairs(entrant: Entrant, own_words: bool) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer ids of each turn, the end of turn included."""
    if own_words:
        return [(t.prompt.generator_ids, t.candidate.ids) for t in entrant.turns]
    return [
        (t.prompt.target_ids, [*t.prompt.primed, *t.candidate.ids])
        for t in entrant.turns
    ]


def _name(group: Group, entrant: Entrant) -> str:
    return f"{group.task.id}:{entrant.index}:{len(entrant.turns)}"


def _of(group: Group, entrant: Entrant, log: ScoreLog) -> float:
    stored = log.get(_name(group, entrant))
    assert stored
    return stored[0]


def _judged(
    groups: Sequence[Group],
    settings: Settings,
    experts: Experts,
    store: Store,
    candidate_key: str,
) -> tuple[Scores, int]:
    source = _need(experts.expert, settings)
    facts = {"what": judging.wording_hash(), "seed": settings.seed}
    log = store.scores(candidate_key, content_key(source.facts | facts))
    missing = [g for g in groups if log.get(_names(g)) is None]
    with ExitStack() as stack:
        expert: Expert | None = None
        for start in tqdm(range(0, len(missing), _BATCH), desc="FAQ: judging"):
            if expert is None:
                expert = stack.enter_context(source.open())
            _judge_groups(missing[start : start + _BATCH], expert, settings.seed, log)
    scores: Scores = {}
    unjudged = 0
    for group in groups:
        grades = log.get(_names(group)) or None
        if grades is None:
            unjudged += 1
        for place, entrant in enumerate(group.entrants):
            # without a verdict the group is decided by log-probability
            score = entrant.score or 0.0 if grades is None else grades[place]
            scores[group.task.id, entrant.index] = score
    if unjudged:
        logger.warning(
            f"FAQ: the judge gave no readable grades for {unjudged} of "
            f"{len(groups)} groups; they are decided by the generator's "
            "log-probabilities"
        )
    return scores, unjudged


def _judge_groups(
    groups: Sequence[Group], expert: Expert, seed: int, log: ScoreLog
) -> None:
    """Both orders of every group; an order whose reply is unreadable is asked twice.

    The second time the expert is held to the very form, where its server can do that.
    """
    asked = [
        (group, order)
        for group in groups
        for order in judging.orders(group.task.id, len(group.entrants), seed)
    ]
    verdicts: list[list[int] | None] = [None] * len(asked)
    for attempt in range(2):
        left = [i for i, found in enumerate(verdicts) if found is None]
        by_size: dict[int, list[int]] = {}
        for i in left:
            by_size.setdefault(len(asked[i][1]), []).append(i)
        for size, places in by_size.items():
            chats = [[_question(*asked[i])] for i in places]
            limit = _GRADE_TOKENS * (size + 1)
            form = judging.pattern(size) if attempt else None
            replies = expert.replies(chats, judging.schema(size), limit, form)
            for i, reply in zip(places, replies, strict=True):
                verdicts[i] = judging.verdict(reply, asked[i][1])
    for index, group in enumerate(groups):
        grades = judging.average(verdicts[2 * index : 2 * index + 2])
        log.append(_names(group), grades or [])


def _question(group: Group, order: Sequence[int]) -> dict[str, str]:
    longest = max(group.entrants, key=lambda entrant: len(entrant.turns))
    messages = longest.turns[-1].prompt.messages
    said = [f"{m['role']}: {m['content']}" for m in messages or []]
    asked = "\n\n".join(line for line in said if not line.startswith("assistant"))
    answers = ["\n\n".join(t.text for t in entrant.turns) for entrant in group.entrants]
    return judging.question(asked, answers, order)


def _names(group: Group) -> str:
    """Grades are relative, so they belong to the very group that was shown."""
    return ",".join(_name(group, entrant) for entrant in group.entrants)


def _need(source: ExpertSource | None, settings: Settings) -> ExpertSource:
    if source is None:
        raise RegenerationError(
            f"the selector {settings.selector} needs an expert that can be asked for "
            "scores. Name one in `expert`, or choose the selector random."
        )
    return source
