"""Answers from the store, or else from the generator, which opens when needed."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tqdm import tqdm

from llmc_faq_slider.faq.generators import Generator, GeneratorSource
from llmc_faq_slider.faq.preparation import (
    Conversation,
    Prompt,
    Task,
    Turn,
    fits,
    prepare,
    request,
)
from llmc_faq_slider.faq.sampling import Draw
from llmc_faq_slider.faq.settings import Settings
from llmc_faq_slider.faq.store import Candidate, CandidateLog


@dataclass(frozen=True)
class Chain:
    """One candidate of a task: its turns, each continuing those before it.

    :param index: candidate number
    :param whole: every turn was asked for, and the last one is finished
    """

    index: int
    turns: list[Turn]
    whole: bool


class Writer:
    """Has tasks answered, each by a number of candidates.

    :param stack: closes the generator in the end
    :param bar: counts answers
    """

    def __init__(
        self,
        source: GeneratorSource,
        settings: Settings,
        talk: Conversation,
        log: CandidateLog,
        stack: ExitStack,
        bar: tqdm,
    ):
        self._source = source
        self._settings = settings
        self._talk = talk
        self._log = log
        self._stack = stack
        self._generator: Generator | None = None
        self._bar = bar

    def answer(self, tasks: Sequence[Task]) -> list[list[Chain]]:
        """All candidates of each task.

        A model in this process is asked for one candidate of every task at a time, as
        a batch that stays the same when more candidates are wanted later.
        """
        indices = list(range(self._settings.num_candidates))
        together = self._source.independent or any(task.attempt for task in tasks)
        passes = [indices] if together else [[index] for index in indices]
        chains: dict[tuple[str, int], Chain] = {}
        for wave in passes:
            for (task, index), chain in self._chains(tasks, wave).items():
                chains[task.id, index] = chain
        return [[chains[task.id, index] for index in indices] for task in tasks]

    def _chains(
        self, tasks: Sequence[Task], indices: Sequence[int]
    ) -> dict[tuple[Task, int], Chain]:
        places = [(task, index) for task in tasks for index in indices]
        written: dict[tuple[Task, int], list[Turn]] = {place: [] for place in places}
        whole: set[tuple[Task, int]] = set()
        open_places = places
        while open_places:
            asked: list[tuple[tuple[Task, int], Prompt]] = []
            for place in open_places:
                prompt = prepare(place[0], written[place], self._talk)
                if prompt is None:
                    whole.add(place)
                elif fits(prompt, self._source.context_length, self._settings):
                    asked.append((place, prompt))
            self._ask([(prompt, place[1]) for place, prompt in asked], tasks)
            open_places = []
            for place, prompt in asked:
                candidate = self._log.get(prompt.id, place[1])
                assert candidate is not None
                written[place].append(self._turn(prompt, candidate))
                # nothing sensible follows an answer that was cut off
                if candidate.finished and candidate.failure is None:
                    open_places.append(place)
        return {
            place: Chain(place[1], written[place], place in whole) for place in places
        }

    def _ask(self, wanted: Sequence[tuple[Prompt, int]], tasks: Sequence[Task]) -> None:
        missing = [(p, i) for p, i in wanted if self._log.get(p.id, i) is None]
        if not missing:
            self._bar.update(len(wanted))
            return
        if self._generator is None:
            self._generator = self._stack.enter_context(self._source.open())
        # a batch is asked for as a whole, because rounding depends on its rows
        asked = missing if self._source.independent else list(wanted)
        sampling = self._settings.sampling
        if any(task.attempt for task in tasks):
            # answers cut off at the limit are a common reason to be here
            sampling = replace(sampling, max_new_tokens=2 * sampling.max_new_tokens)

        before = self._bar.n

        def show(share: float) -> None:
            self._bar.update(before + share * len(asked) - self._bar.n)

        def keep(position: int, draw: Draw) -> None:
            prompt, index = asked[position]
            candidate = Candidate(
                prompt.id,
                index,
                draw.ids,
                draw.finished,
                draw.score,
                draw.exact,
                draw.failure,
                len(prompt.generator_ids),
            )
            if draw.failure == "refused":
                # the server may take it another time
                self._log.note(candidate)
            else:
                self._log.append(candidate)

        self._generator.answer(
            [request(p, i, self._talk, self._settings.seed) for p, i in asked],
            sampling,
            show,
            keep,
        )
        show(1.0)
        lost = sum(self._log.get(p.id, i) is None for p, i in asked)
        if lost:
            raise RuntimeError(
                f"generator {self._source.identity} answered {len(asked) - lost} of "
                f"{len(asked)} requests"
            )

    def _turn(self, prompt: Prompt, candidate: Candidate) -> Turn:
        ids = candidate.ids
        ended = candidate.finished and ids and ids[-1] in self._source.end_ids
        body = [*prompt.primed, *(ids[:-1] if ended else ids)]
        return Turn(prompt, candidate, body, str(self._talk.target.decode(body)))
