"""Gates and group competition over one prompt after another, with what they yield."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmc_faq_slider.faq.gates import failed_gate, normalised
from llmc_faq_slider.faq.preparation import Conversation, Prompt, original
from llmc_faq_slider.faq.rendering import (
    THINK_OPEN,
    Sample,
    control_ids,
    end_of_turn_id,
    render,
)
from llmc_faq_slider.faq.selection import Contender, winner
from llmc_faq_slider.faq.settings import Settings
from llmc_faq_slider.faq.store import Candidate


class RegenerationError(RuntimeError):
    """The generator did not yield enough valid data."""


@dataclass
class Outcome:
    """What the competitions have yielded so far.

    :param samples: rendered winners, in the order of their prompts
    :param counts: prompts, candidates and tokens by what became of them
    :param gates: candidates by the gate that refused them
    """

    samples: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    gates: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return self.counts["tokens_selected"]

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        self.counts["tokens_selected"] += len(sample.input_ids)


class Competition:
    """Holds the competition of each prompt's candidates.

    :param talk: how both models are addressed
    :param settings: gates, selector, seed
    :param end_ids: ids that end an answer of the generator
    """

    def __init__(self, talk: Conversation, settings: Settings, end_ids: frozenset[int]):
        self.outcome = Outcome()
        self._talk = talk
        self._settings = settings
        self._end_ids = end_ids
        self._control_ids = control_ids(talk.target)
        self._end_of_turn = end_of_turn_id(talk.target)
        self._seen: set[str] = set()

    def hold(self, prompt: Prompt, group: Sequence[Candidate]) -> None:
        """Gate the candidates, choose one and add its sample to the outcome.

        Without a valid candidate the seed itself is added if it is a sample by itself
        (a passage, or a chat with its answer); a bare request is dropped.
        """
        outcome, settings = self.outcome, self._settings
        outcome.counts["prompts_answered"] += 1
        bodies = {c.index: self._body(prompt, c) for c in group}
        valid = [c for c in group if self._is_valid(prompt, c, bodies[c.index])]
        if valid:
            best = winner(
                [_contender(c, bodies[c.index]) for c in valid],
                settings.selector,
                settings.seed,
            )
            outcome.counts["selected_truncated"] += best.truncated
            end_id = None if best.truncated else self._end_of_turn
            outcome.add(render(prompt.target_ids, bodies[best.index], end_id))
            return
        given = original(prompt.seed, self._talk, settings.sequence_length)
        if given is None:
            outcome.counts["prompts_dropped"] += 1
            return
        outcome.counts["prompts_fallback"] += 1
        outcome.add(Sample(given, [1] * len(given)))

    def check_fallbacks(self) -> None:
        """Refuse to go on when too many prompts had no valid candidate.

        :raises RegenerationError: naming the share, the limit and the gates that fired
        """
        counts, settings = self.outcome.counts, self._settings
        asked = counts["prompts_answered"]
        lost = counts["prompts_dropped"] + counts["prompts_fallback"]
        if lost <= settings.max_fallback_fraction * asked:
            return
        fired = ", ".join(f"{n} x {g}" for g, n in self.outcome.gates.most_common())
        raise RegenerationError(
            f"FAQModifier: {lost} of {asked} prompts ({lost / asked:.0%}, limit "
            f"{settings.max_fallback_fraction:.0%}) have no valid answer among "
            f"{settings.num_candidates} candidates each; gates that fired: {fired}. "
            "Choose a stronger generator, raise num_candidates or max_new_tokens, "
            "loosen the gate that fires most, or raise max_fallback_fraction."
        )

    def _body(self, prompt: Prompt, candidate: Candidate) -> list[int]:
        ids = candidate.ids
        ended = candidate.finished and ids[-1] in self._end_ids
        return [*prompt.primed, *(ids[:-1] if ended else ids)]

    def _is_valid(
        self, prompt: Prompt, candidate: Candidate, body: Sequence[int]
    ) -> bool:
        outcome, truncated = self.outcome, not candidate.finished
        outcome.counts["candidates"] += 1
        outcome.counts["candidates_truncated"] += truncated
        outcome.counts["tokens_generated"] += len(candidate.ids)
        inside = prompt.inside_thinking and not prompt.primed
        text = (THINK_OPEN if inside else "") + str(self._talk.target.decode(body))
        failed = failed_gate(
            body, text, truncated, self._control_ids, self._settings.gates
        )
        if failed is None and normalised(text) in self._seen:
            failed = "duplicate"
        if failed is not None:
            outcome.gates[failed] += 1
            return False
        self._seen.add(normalised(text))
        return True


def _contender(candidate: Candidate, body: Sequence[int]) -> Contender:
    return Contender(
        candidate.prompt_id,
        candidate.index,
        len(body),
        not candidate.finished,
        candidate.score,
    )
