"""From scored groups to the rows of the data set."""

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from llmc_faq_slider.faq.competition import Entrant, Group, Outcome
from llmc_faq_slider.faq.grading import Scores
from llmc_faq_slider.faq.prompts import Message
from llmc_faq_slider.faq.rendering import Sample
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


def ranked(group: Group, scores: Scores, settings: Settings) -> list[Entrant]:
    """Finished answers first, then by score or by chance, the best one first.

    Ties go to the shorter answer, then to the lower candidate number.
    """

    def measure(entrant: Entrant) -> float:
        if settings.selector == "random":
            key = f"{settings.seed}:{group.task.id}:{entrant.index}"
            return float(zlib.crc32(key.encode()))
        return scores.get((group.task.id, entrant.index), 0.0)

    return sorted(
        group.entrants, key=lambda e: (not e.whole, -measure(e), e.num_tokens, e.index)
    )


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


def pack(
    samples: Sequence[Sample], num_rows: int, row_length: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffle whole samples, concatenate them and cut the stream into rows.

    :param samples: rendered samples, in a fixed order
    :param num_rows: rows to make (N)
    :param row_length: tokens of each row (L)
    :param seed: seed of the shuffle
    :return: ``input_ids`` int32 [N, L] and ``loss_mask`` uint8 [N, L]
    :raises ValueError: when the samples hold fewer than N x L tokens
    """
    total = sum(len(sample.input_ids) for sample in samples)
    needed = num_rows * row_length
    if total < needed:
        raise ValueError(
            f"packing {num_rows} rows of {row_length} tokens needs {needed} tokens, "
            f"the samples hold {total}"
        )
    order = torch.randperm(
        len(samples), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    ids = [i for index in order for i in samples[index].input_ids][:needed]
    mask = [m for index in order for m in samples[index].loss_mask][:needed]
    shape = (num_rows, row_length)
    return (
        torch.tensor(ids, dtype=torch.int32).reshape(shape),
        torch.tensor(mask, dtype=torch.uint8).reshape(shape),
    )


def _queue(group: Group, scores: Scores, settings: Settings) -> list[Pick]:
    if not group.entrants:
        assert group.fallback is not None
        given = [{"role": r, "content": said} for r, said in group.task.seed.messages]
        return [Pick(group, None, 0, [group.fallback], False, None, given)]
    order = ranked(group, scores, settings)
    told = [scores.get((group.task.id, entrant.index), 0.0) for entrant in order]
    margins = [*[one - other for one, other in pairwise(told)], None]
    return [
        Pick(
            group,
            entrant.index,
            place,
            entrant.samples,
            not entrant.whole,
            margin,
            _chat(entrant),
        )
        for place, (entrant, margin) in enumerate(zip(order, margins, strict=True))
    ]


def _chat(entrant: Entrant) -> list[Message]:
    last = entrant.turns[-1]
    if last.prompt.messages is None:
        return []
    return [*last.prompt.messages, {"role": "assistant", "content": last.text}]
