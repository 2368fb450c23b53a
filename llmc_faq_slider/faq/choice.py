"""From scored groups to the samples of the data set."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llmc_faq_slider.faq.competition import Entrant, Group, Outcome
from llmc_faq_slider.faq.grading import Scores
from llmc_faq_slider.faq.prompts import Message
from llmc_faq_slider.faq.rendering import Sample
from llmc_faq_slider.faq.selection import Contender, ranked
from llmc_faq_slider.faq.settings import Settings


@dataclass(frozen=True)
class Pick:
    """A candidate, or the seed of a task that fell back, in its place of the queue.

    :param place: 0 for the winner of its group, 1 for the second
    :param margin: score above the next of the group, None without a next
    :param messages: the chat with its new answers; empty for a plain text
    """

    group: Group
    index: int | None
    place: int
    samples: list[Sample]
    truncated: bool
    margin: float | None
    messages: list[Message]

    @property
    def size(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)


def queues(outcome: Outcome, scores: Scores, settings: Settings) -> list[list[Pick]]:
    """Per group its picks, the winner first."""
    return [_queue(group, scores, settings) for group in outcome.groups]


def choose(
    queued: Sequence[Sequence[Pick]],
    asked: Counter[str],
    budget: int,
) -> list[Pick]:
    """Take picks until they hold ``budget`` tokens, each source in its proportion.

    The next pick comes from the source that is furthest behind its share of the
    prompts that were asked, so that gates which hit one source harder do not shift the
    mixture. A source gives its winners in order, then, when it has no more, its second
    places, and so on: with a selector that likes short answers the winners alone may
    not fill the budget, and no selector may ask for more answers than another.

    :param asked: prompts by source
    """
    waiting: dict[str, list[Pick]] = defaultdict(list)
    for queue in queued:
        for pick in queue:
            waiting[pick.group.task.seed.source].append(pick)
    for picks in waiting.values():
        picks.sort(key=lambda pick: pick.place)
        picks.reverse()
    total = sum(asked[source] for source in waiting) or 1
    shares = {source: asked[source] / total for source in waiting}
    taken: Counter[str] = Counter()
    chosen: list[Pick] = []
    tokens = 0
    while tokens < budget and waiting:
        count = len(chosen) + 1
        source = max(waiting, key=lambda s: (shares[s] * count - taken[s], s))
        pick = waiting[source].pop()
        if not waiting[source]:
            del waiting[source]
        taken[source] += 1
        chosen.append(pick)
        tokens += pick.size
    return chosen


def _queue(group: Group, scores: Scores, settings: Settings) -> list[Pick]:
    if not group.entrants:
        assert group.fallback is not None
        given = [{"role": r, "content": said} for r, said in group.task.seed.messages]
        return [Pick(group, None, 0, [group.fallback], False, None, given)]
    contenders = [
        Contender(
            group.task.id,
            entrant.index,
            entrant.num_tokens,
            not entrant.whole,
            scores.get((group.task.id, entrant.index), 0.0),
        )
        for entrant in group.entrants
    ]
    order = ranked(contenders, settings.selector, settings.seed)
    entrants = {entrant.index: entrant for entrant in group.entrants}
    after = [*[c.score for c in order[1:]], None]
    return [
        Pick(
            group,
            contender.index,
            place,
            entrants[contender.index].samples,
            contender.truncated,
            None if following is None else contender.score - following,
            _chat(entrants[contender.index]),
        )
        for place, (contender, following) in enumerate(zip(order, after, strict=True))
    ]


def _chat(entrant: Entrant) -> list[Message]:
    last = entrant.turns[-1]
    if last.prompt.messages is None:
        return []
    return [*last.prompt.messages, {"role": "assistant", "content": last.text}]
