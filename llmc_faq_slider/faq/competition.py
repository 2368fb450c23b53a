"""Gates over one task's candidates after another, and what comes through."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmc_faq_slider.faq.gates import Evaluation, Seen, failed_gate, is_refusal
from llmc_faq_slider.faq.plain import marks
from llmc_faq_slider.faq.preparation import Conversation, Task, Turn, original
from llmc_faq_slider.faq.rendering import (
    THINK_OPEN,
    Sample,
    control_ids,
    end_of_turn_id,
    join,
    render,
)
from llmc_faq_slider.faq.settings import Settings
from llmc_faq_slider.faq.writer import Chain

#: share of the first prompts that have to give something
LEAST_YIELD = 0.25
#: fields that loosen a gate; changing them asks for no answer again
_LOOSENED_BY = {
    "truncated": "accept_truncated",
    "too_short": "min_response_tokens",
    "compressible": "max_zlib_ratio",
    "repetitive": "max_repeated_share",
    "refusal": "allow_refusals",
    "near_duplicate": "max_similarity",
}


class RegenerationError(RuntimeError):
    """The generator did not yield enough valid data."""


@dataclass(frozen=True)
class Entrant:
    """A valid candidate.

    :param turns: its valid turns
    :param whole: no turn is missing and the last one is finished
    :param samples: the turns rendered for the target
    """

    index: int
    turns: list[Turn]
    whole: bool
    samples: list[Sample]

    @property
    def num_tokens(self) -> int:
        """Tokens of its answers."""
        return sum(len(turn.body) for turn in self.turns)

    @property
    def size(self) -> int:
        """Tokens of its samples."""
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def score(self) -> float | None:
        """Mean log-probability per token under the generator, None if not told."""
        scores = [turn.candidate.score for turn in self.turns]
        sizes = [len(turn.candidate.ids) for turn in self.turns]
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            return None
        return sum(s * n for s, n in zip(known, sizes, strict=True)) / sum(sizes)


@dataclass(frozen=True)
class Group:
    """What stands to choose from for one task.

    :param entrants: its valid candidates; empty if it fell back to its seed
    :param fallback: the seed itself as a sample
    """

    task: Task
    entrants: list[Entrant]
    fallback: Sample | None = None

    @property
    def expected_tokens(self) -> float:
        """Tokens it adds to the data set, whoever wins.

        The same for all selectors, so that none of them needs more prompts answered
        than another.
        """
        if not self.entrants:
            return len(self.fallback.input_ids) if self.fallback else 0
        first = [e for e in self.entrants if e.whole] or self.entrants
        return sum(entrant.size for entrant in first) / len(first)


@dataclass
class Outcome:
    """What the gates have let through so far.

    :param groups: tasks with a sample to give, in order
    :param counts: prompts, candidates and tokens by what became of them
    :param gates: candidates by the gate that refused them
    :param asked: answered tasks by the source of their seeds
    """

    groups: list[Group] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    gates: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    tokens: float = 0.0

    def add(self, group: Group) -> None:
        self.groups.append(group)
        self.tokens += group.expected_tokens


class Referee:
    """Holds the gates.

    :param talk: how both models are addressed
    :param settings: limits of the gates
    :param evaluation: texts the data must not repeat, if any
    """

    def __init__(
        self, talk: Conversation, settings: Settings, evaluation: Evaluation | None
    ):
        self.outcome = Outcome()
        self._talk = talk
        self._settings = settings
        self._evaluation = evaluation
        self._control_ids = control_ids(talk.target)
        self._marks = marks(talk.target, talk.speaker)
        self._end_of_turn = end_of_turn_id(talk.target)
        self._seen = Seen(settings.gates.max_similarity)

    def admit(self, task: Task, chains: Sequence[Chain]) -> list[Entrant]:
        """The candidates that pass the gates, up to their first turn that does not."""
        return [e for chain in chains if (e := self._entrant(task, chain)) is not None]

    def settle(self, task: Task, entrants: list[Entrant]) -> None:
        """Add the group of a task that is not tried again.

        Without a valid candidate the seed itself is added if it is a sample by itself
        (a passage, or a chat with its answer) and such seeds stay within
        ``max_fallback_fraction`` of the prompts so far. Else the prompt is dropped, and
        one that comes later takes its place.
        """
        counts, settings = self.outcome.counts, self._settings
        counts["prompts_answered"] += 1
        self.outcome.asked[task.seed.source] += 1
        if entrants:
            self.outcome.add(Group(task, entrants))
            return
        given = original(task.seed, self._talk, settings.sequence_length)
        allowed = settings.max_fallback_fraction * counts["prompts_answered"]
        if given is None or counts["prompts_fallback"] + 1 > allowed:
            counts["prompts_dropped"] += 1
            return
        counts["prompts_fallback"] += 1
        self.outcome.add(Group(task, [], Sample(given, [1] * len(given))))

    def check_trial(self) -> None:
        """Give up when the first prompts gave almost nothing.

        :raises RegenerationError: with the counts, and how to go on
        """
        answered = self.outcome.counts["prompts_answered"]
        if self._valid() >= LEAST_YIELD * answered:
            return
        raise RegenerationError(
            f"FAQModifier: {self._tally()}, fewer than one in four, so going on is "
            f"hopeless. {self._way_on()}"
        )

    def check_budget(self, wanted: int, rounds: int) -> None:
        """Refuse fewer tokens than the data set takes.

        :param rounds: how often the seeds were answered with other random numbers
        :raises RegenerationError: with the counts, and how to go on
        """
        if self.outcome.tokens >= wanted:
            return
        too_long = self.outcome.counts["prompts_too_long"]
        if not self.outcome.counts["prompts_answered"]:
            raise RegenerationError(
                f"FAQModifier: all {too_long} prompts are too long to be "
                "answered. Give shorter seeds, a longer sequence_length, or a "
                "generator that reads more."
            )
        raise RegenerationError(
            f"FAQModifier: {rounds} rounds through the seeds gave "
            f"{self.outcome.tokens:.0f} tokens, {wanted} are needed; {self._tally()}"
            + (f", {too_long} were too long" if too_long else "")
            + ". Lower num_samples, or give more seeds, which begins anew. "
            + self._way_on()
        )

    def _valid(self) -> int:
        """Prompts with a valid answer; seeds that stand in for one do not count."""
        return sum(bool(group.entrants) for group in self.outcome.groups)

    def _tally(self) -> str:
        """Such as ``8 of 72 prompts have a valid answer (gates that fired: ...)``."""
        counts, settings = self.outcome.counts, self._settings
        fired = ", ".join(f"{n} x {g}" for g, n in self.outcome.gates.most_common())
        each = settings.num_candidates
        return (
            f"{self._valid()} of {counts['prompts_answered']} prompts have a valid "
            f"answer among {each} candidate{'s' if each > 1 else ''} each"
            + (f" (gates that fired: {fired})" if fired else "")
        )

    def _way_on(self) -> str:
        fields = [
            _LOOSENED_BY[gate]
            for gate, _ in self.outcome.gates.most_common()
            if gate in _LOOSENED_BY
        ]
        fields += ["num_candidates", "retries"]
        return (
            "All answers are kept: the same command goes on with them once one of "
            f"these is changed: {', '.join(dict.fromkeys(fields))}. Another generator, "
            "sequence_length or sampling begins anew."
        )

    def _entrant(self, task: Task, chain: Chain) -> Entrant | None:
        for turn in chain.turns:
            self._count(turn)
        valid: list[Turn] = []
        for turn in chain.turns:
            failed = self._failed(task, turn)
            if failed is not None:
                self.outcome.gates[failed] += 1
                break
            valid.append(turn)
            self._seen.add(task.id, turn.text, turn.body)
        if not valid:
            return None
        whole = chain.whole and len(valid) == len(chain.turns)
        return Entrant(chain.index, valid, whole, self._samples(valid))

    def _count(self, turn: Turn) -> None:
        counts, candidate = self.outcome.counts, turn.candidate
        answered = candidate.failure is None
        counts["candidates"] += 1
        counts["candidates_truncated"] += answered and not candidate.finished
        counts["candidates_retokenized"] += answered and not candidate.exact
        counts["tokens_prompted"] += candidate.prompt_tokens
        counts["tokens_generated"] += len(candidate.ids)

    def _failed(self, task: Task, turn: Turn) -> str | None:
        gates, truncated = self._settings.gates, not turn.candidate.finished
        if turn.candidate.failure is not None:
            return turn.candidate.failure
        inside = turn.prompt.inside_thinking and not turn.prompt.primed
        text = (THINK_OPEN if inside else "") + turn.text
        failed = failed_gate(
            turn.body, text, truncated, self._control_ids, gates, self._marks
        )
        return failed or self._failed_content(task, turn, text)

    def _failed_content(self, task: Task, turn: Turn, text: str) -> str | None:
        if is_refusal(text) and not self._settings.gates.allow_refusals:
            said = [t for role, t in task.seed.messages if role == "assistant"]
            if not any(map(is_refusal, said)):
                return "refusal"
        if self._evaluation is not None and self._evaluation.overlaps(text):
            return "evaluation_overlap"
        return self._seen.failed(task.id, text, turn.body)

    def _samples(self, turns: Sequence[Turn]) -> list[Sample]:
        """One sample per turn, or one for turns that continue each other's ids."""
        samples: list[Sample] = []
        for turn in turns:
            end = self._end_of_turn if turn.candidate.finished else None
            sample = render(turn.prompt.target_ids, turn.body, end)
            joined = join(samples[-1], sample) if samples else None
            if joined is not None:
                samples[-1] = joined
            else:
                samples.append(sample)
        return samples


def losses(counts: Mapping[str, int]) -> str | None:
    """A sentence on prompts that gave no valid answer, None if there are none.

    :param counts: those of an :class:`Outcome`, or of a manifest
    """
    dropped, fallback = counts["prompts_dropped"], counts["prompts_fallback"]
    if not dropped + fallback:
        return None
    return (
        f"FAQ: {dropped + fallback} of {counts['prompts_answered']} prompts had no "
        f"valid answer: {dropped} were replaced by other prompts, {fallback} by their "
        "seeds as they are."
    )
