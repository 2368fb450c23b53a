"""The stage as one function: seeds in, packed calibration rows out."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.choice import Pick, choose, pack, queues
from llmc_faq_slider.faq.competition import (
    Outcome,
    Referee,
    RegenerationError,
    losses,
)
from llmc_faq_slider.faq.gates import Evaluation
from llmc_faq_slider.faq.generators import GeneratorSource
from llmc_faq_slider.faq.grading import Experts, grade
from llmc_faq_slider.faq.manifest import candidate_facts, dataset_facts, manifest
from llmc_faq_slider.faq.plain import marks, plain_seeds
from llmc_faq_slider.faq.preparation import Conversation, Task, batches, conversation
from llmc_faq_slider.faq.seeds import Seed, seed_texts
from llmc_faq_slider.faq.settings import TRIAL_PROMPTS, Settings
from llmc_faq_slider.faq.store import CalibrationSet, Store, content_key
from llmc_faq_slider.faq.writer import Writer

#: prompts of the last batches over those that the answers so far ask for
SPARE = 1.2


def regenerate(
    seeds: Sequence[Seed],
    target: PreTrainedTokenizerBase,
    source: GeneratorSource,
    settings: Settings,
    store: Store,
    experts: Experts = Experts(),
    evaluation: Sequence[Seed] = (),
) -> CalibrationSet:
    """Regenerate calibration data, or read it back if nothing changed.

    Prompts are answered in batches until N x L tokens stand to choose from. One
    without a valid answer is replaced by the next; the seed set is answered anew, with
    other random numbers, when it is too small.

    :param seeds: what to regenerate from; what they say stays in user turns
    :param target: tokenizer (with chat template) of the model to be quantised
    :param source: who writes the candidates
    :param settings: sizes, sampling, gates, selection
    :param store: where candidates, scores and the finished set are kept
    :param experts: who is asked for scores, where the selector wants any
    :param evaluation: what the data must not share a run of 13 words with
    :raises RegenerationError: when fewer than one in four of the first prompts has a
        valid answer, or all rounds through the seeds do not fill N x L tokens
    :raises FolderBusyError: while another process makes the same candidates
    """
    plain = plain_seeds(seeds, marks(target, source.tokenizer))
    if not plain:
        raise RegenerationError(
            f"FAQModifier: the {len(seeds)} seeds hold nothing but marks of chat "
            "templates. Give other seeds."
        )
    check = Evaluation(t for s in evaluation for t in seed_texts(s))
    clean = [s for s in plain if not any(check.overlaps(t) for t in seed_texts(s))]
    if not clean:
        raise RegenerationError(
            f"FAQModifier: all {len(plain)} seeds share a run of 13 words with the "
            "evaluation set. Give other seeds."
        )
    talk = conversation(target, source, settings)
    facts = candidate_facts(clean, source, settings, talk)
    candidate_key = content_key(facts)
    choices = dataset_facts(candidate_key, clean, talk, settings, experts, evaluation)
    dataset_key = content_key(choices)
    with store.locked(candidate_key):
        stored = store.read_dataset(dataset_key)
        if stored is not None:
            logger.info(f"FAQ: reusing {stored.folder}")
            return stored
        log = store.candidates(candidate_key, facts)
        bar = tqdm(unit="answer", desc="FAQ: regenerating", mininterval=1.0)
        with ExitStack() as stack, bar:
            writer = Writer(source, settings, talk, log, stack, bar)
            outcome = _collect(clean, settings, talk, writer, bar, check)
        outcome.counts["seeds_overlapping"] = len(plain) - len(clean)
        scores, unjudged = grade(
            outcome.groups, settings, experts, store, candidate_key
        )
        outcome.counts["groups_unjudged"] = unjudged
        queued = queues(outcome, scores, settings)
        picks = choose(queued, outcome.asked, settings.token_budget)
        input_ids, loss_mask = pack(
            [sample for pick in picks for sample in pick.samples],
            settings.num_samples,
            settings.sequence_length,
            settings.seed,
        )
        described = manifest(
            source, facts, choices, outcome, picks, input_ids, loss_mask
        )
        records = [_record(pick, talk) for pick in picks]
        result = store.write_dataset(
            dataset_key, input_ids, loss_mask, records, described
        )
    logger.info(
        f"FAQ: {settings.num_samples} x {settings.sequence_length} tokens from "
        f"{outcome.counts['prompts_answered']} prompts in {result.folder}"
    )
    return result


def _collect(
    seeds: Sequence[Seed],
    settings: Settings,
    talk: Conversation,
    writer: Writer,
    bar: tqdm,
    check: Evaluation,
) -> Outcome:
    """Groups of valid candidates, enough for N x L tokens whoever wins them."""
    referee = Referee(talk, settings, check)
    outcome = referee.outcome
    wanted = settings.token_budget
    on_trial = True

    def prompts_left() -> float:
        # Until a batch has shown better: answers fill half of what they may.
        each = settings.sampling.max_new_tokens / 2
        answered = outcome.counts["prompts_answered"]
        if outcome.tokens:
            each = outcome.tokens / answered
        return max(0, wanted - outcome.tokens) / each

    def needed() -> int:
        count = math.ceil(SPARE * prompts_left()) + 1
        return min(count, TRIAL_PROMPTS) if on_trial else count

    for batch in batches(seeds, settings, needed):
        if batch[0].round and not outcome.counts["prompts_answered"]:
            break
        answers = max(prompts_left(), len(batch)) * settings.num_candidates
        bar.total = math.ceil(bar.n + answers)
        bar.set_description(f"FAQ: {outcome.tokens:.0f} of {wanted} tokens")
        _answer(batch, settings, writer, referee)
        answered = outcome.counts["prompts_answered"]
        if outcome.tokens >= wanted:
            break
        if on_trial and answered >= TRIAL_PROMPTS:
            referee.check_trial()
            on_trial = False
    referee.check_budget(wanted, batch[0].round + 1)
    sentence = losses(outcome.counts)
    if sentence:
        logger.warning(sentence)
    return outcome


def _answer(
    batch: Sequence[Task], settings: Settings, writer: Writer, referee: Referee
) -> None:
    """Answer a batch, and again those tasks of which no candidate is valid."""
    asked = list(batch)
    for attempt in range(settings.retries + 1):
        again = []
        for task, chains in zip(asked, writer.answer(asked), strict=True):
            if not any(chain.turns for chain in chains):
                referee.outcome.counts["prompts_too_long"] += 1
                continue
            entrants = referee.admit(task, chains)
            if entrants or attempt == settings.retries:
                referee.settle(task, entrants)
            else:
                again.append(Task(task.seed, task.round, attempt + 1))
        asked = again
        referee.outcome.counts["prompts_retried"] += len(again)
        if not asked:
            return


def _record(pick: Pick, talk: Conversation) -> dict[str, Any]:
    """One sample as text: the chat, and the same as the target's template shows it."""
    ids = [index for sample in pick.samples for index in sample.input_ids]
    return {
        "id": pick.group.task.id,
        "source": pick.group.task.seed.source,
        "messages": pick.messages,
        "text": str(talk.target.decode(ids)),
    }
