"""The stage as one function: seeds in, packed calibration rows out."""

import importlib.metadata
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.competition import Competition, Outcome, RegenerationError
from llmc_faq_slider.faq.generators import Generator, GeneratorSource
from llmc_faq_slider.faq.identity import tokenizer_hash
from llmc_faq_slider.faq.packing import pack
from llmc_faq_slider.faq.preparation import (
    Conversation,
    Prompt,
    batches,
    conversation,
    fits,
    prepare,
)
from llmc_faq_slider.faq.prompts import PROMPT_VERSION, wording_hash
from llmc_faq_slider.faq.rendering import template_hash
from llmc_faq_slider.faq.sampling import row_seed
from llmc_faq_slider.faq.seeds import Seed, seeds_hash
from llmc_faq_slider.faq.settings import Settings
from llmc_faq_slider.faq.store import (
    CalibrationSet,
    Candidate,
    CandidateLog,
    Store,
    content_key,
)

#: prompts to judge by before a run that mostly fails is stopped early
_ENOUGH_PROMPTS = 64


def regenerate(
    seeds: Sequence[Seed],
    target: PreTrainedTokenizerBase,
    source: GeneratorSource,
    settings: Settings,
    store: Store,
) -> CalibrationSet:
    """Regenerate calibration data, or read it back if nothing changed.

    Prompts are answered in batches until N x L tokens are selected; the seed set is
    answered anew, with other random numbers, when it is too small.

    :param seeds: what to regenerate from
    :param target: tokenizer (with chat template) of the model to be quantised
    :param source: who writes the candidates
    :param settings: sizes, sampling, gates, selection
    :param store: where candidates and the finished set are kept
    :raises RegenerationError: when too few answers are valid
    """
    talk = conversation(target, source, settings)
    candidate_facts = _candidate_facts(seeds, source, settings, talk)
    candidate_key = content_key(candidate_facts)
    dataset_facts = _dataset_facts(candidate_key, target, settings)
    dataset_key = content_key(dataset_facts)
    with store.locked():
        stored = store.read_dataset(dataset_key)
        if stored is not None:
            logger.info(f"FAQ: reusing {store.dataset_folder(dataset_key)}")
            return stored
        log = store.candidates(candidate_key, candidate_facts)
        with ExitStack() as stack:
            writer = _Writer(source, settings, log, stack)
            outcome = _collect(seeds, source, settings, talk, writer)
        input_ids, loss_mask = pack(
            outcome.samples,
            settings.num_samples,
            settings.sequence_length,
            settings.seed,
        )
        manifest = {
            "generator": source.identity,
            "candidates": candidate_facts,
            "dataset": dataset_facts,
            "counts": dict(sorted(outcome.counts.items())),
            "gates": dict(sorted(outcome.gates.items())),
            "tokens": input_ids.numel(),
            "answer_tokens": int(loss_mask.sum()),
            "versions": _versions(),
        }
        result = store.write_dataset(dataset_key, input_ids, loss_mask, manifest)
    logger.info(
        f"FAQ: {settings.num_samples} x {settings.sequence_length} tokens from "
        f"{outcome.counts['prompts_answered']} prompts in "
        f"{store.dataset_folder(dataset_key)}"
    )
    return result


class _Writer:
    """Answers from the log, or else from the generator, which opens when needed."""

    def __init__(
        self,
        source: GeneratorSource,
        settings: Settings,
        log: CandidateLog,
        stack: ExitStack,
    ):
        self._source = source
        self._settings = settings
        self._log = log
        self._stack = stack
        self._generator: Generator | None = None

    def candidates(
        self, prompts: Sequence[Prompt], index: int, progress: tqdm
    ) -> list[Candidate]:
        """Candidate ``index`` of each prompt of a batch."""
        steps = self._settings.sampling.max_new_tokens
        stored = [self._log.get(prompt.id, index) for prompt in prompts]
        known = [candidate for candidate in stored if candidate is not None]
        if len(known) == len(prompts):
            progress.update(steps)
            return known
        if self._generator is None:
            self._generator = self._stack.enter_context(self._source.open())
        end = progress.n + steps
        which = f"candidate {index + 1}/{self._settings.num_candidates}"

        def show(live: int) -> None:
            progress.set_postfix_str(f"{which}, {live} answers", refresh=False)
            progress.update(1)

        draws = self._generator.answer(
            [prompt.generator_ids for prompt in prompts],
            [row_seed(self._settings.seed, prompt.id, index) for prompt in prompts],
            self._settings.sampling,
            show,
        )
        made = [
            Candidate(
                prompt.id,
                index,
                draw.ids,
                draw.finished,
                sum(draw.logprobs) / len(draw.logprobs),
            )
            for prompt, draw in zip(prompts, draws, strict=True)
        ]
        self._log.append(made)
        progress.update(end - progress.n)
        return made


def _collect(
    seeds: Sequence[Seed],
    source: GeneratorSource,
    settings: Settings,
    talk: Conversation,
    writer: _Writer,
) -> Outcome:
    """Winners' samples, at least N x L tokens of them."""
    competition = Competition(talk, settings, source.end_ids)
    outcome = competition.outcome
    steps_per_batch = settings.num_candidates * settings.sampling.max_new_tokens
    # Until a batch has shown better: answers fill half of what they may.
    tokens_per_batch = settings.batch_size * settings.sampling.max_new_tokens / 2
    with tqdm(unit="step", desc="FAQ: regenerating", mininterval=1.0) as progress:
        for done, batch in enumerate(batches(seeds, settings)):
            if outcome.tokens:
                tokens_per_batch = outcome.tokens / done
            missing = max(0, settings.token_budget - outcome.tokens)
            left = math.ceil(missing / tokens_per_batch)
            progress.total = progress.n + left * steps_per_batch
            progress.set_description(
                f"FAQ: {outcome.tokens} of {settings.token_budget} tokens"
            )
            asked = [prepare(seed, number, talk) for seed, number in batch]
            prompts = [p for p in asked if fits(p, source.context_length, settings)]
            outcome.counts["prompts_too_long"] += len(asked) - len(prompts)
            if not prompts:
                continue
            passes = [
                writer.candidates(prompts, index, progress)
                for index in range(settings.num_candidates)
            ]
            for prompt, group in zip(prompts, zip(*passes, strict=True), strict=True):
                competition.hold(prompt, group)
            if outcome.counts["prompts_answered"] >= _ENOUGH_PROMPTS:
                competition.check_fallbacks()
            if outcome.tokens >= settings.token_budget:
                break
    competition.check_fallbacks()
    if outcome.tokens < settings.token_budget:
        raise RegenerationError(
            f"FAQModifier: {len(seeds)} seeds gave {outcome.tokens} tokens, "
            f"{settings.num_samples} x {settings.sequence_length} = "
            f"{settings.token_budget} are needed. Give more seeds, or lower "
            "num_samples or sequence_length."
        )
    return outcome


def _candidate_facts(
    seeds: Sequence[Seed],
    source: GeneratorSource,
    settings: Settings,
    talk: Conversation,
) -> dict[str, Any]:
    """What decides the candidates. The number of them, gates and selection do not."""
    identity = {k: v for k, v in source.identity.items() if k != "name"}
    return {
        "generator": identity,
        "tokenizer": tokenizer_hash(source.tokenizer),
        "template": template_hash(talk.speaker) if talk.is_chat else None,
        "target_template": template_hash(talk.target),
        "enable_thinking": talk.enable_thinking,
        "seeds": seeds_hash(seeds),
        "num_seeds": len(seeds),
        "prompts": PROMPT_VERSION,
        "wording": wording_hash(),
        "wrapping": asdict(talk.wrapping),
        "sampling": asdict(settings.sampling),
        "end_ids": sorted(source.end_ids),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }


def _dataset_facts(
    candidate_key: str, target: PreTrainedTokenizerBase, settings: Settings
) -> dict[str, Any]:
    return {
        "candidates": candidate_key,
        "target_tokenizer": tokenizer_hash(target),
        "settings": asdict(settings),
    }


def _versions() -> dict[str, str]:
    return dict(_installed(("llmc_faq_slider", "torch", "transformers")))


def _installed(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed as a package"
