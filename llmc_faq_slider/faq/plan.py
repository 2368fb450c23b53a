"""What a run will cost, from a pilot of a few prompts."""

import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.competition import Referee
from llmc_faq_slider.faq.generators import GeneratorSource
from llmc_faq_slider.faq.plain import marks, plain_seeds
from llmc_faq_slider.faq.preparation import batches, conversation
from llmc_faq_slider.faq.seeds import Seed
from llmc_faq_slider.faq.settings import Settings
from llmc_faq_slider.faq.store import Store
from llmc_faq_slider.faq.writer import Writer

PILOT = 8


@dataclass(frozen=True)
class Plan:
    """Expected cost of a run whose store is empty.

    :param prompts: prompts to answer
    :param requests: answers to write
    :param prompt_tokens: tokens the generator reads
    :param answer_tokens: tokens it writes
    :param seconds: time to write them, at the pace of the pilot
    :param valid: share of the pilot's answers that passed the gates
    :param truncated: share of the pilot's answers that were cut off
    """

    prompts: int
    requests: int
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    valid: float
    truncated: float


def plan(
    seeds: Sequence[Seed],
    target: PreTrainedTokenizerBase,
    source: GeneratorSource,
    settings: Settings,
    pilot: int = PILOT,
) -> Plan:
    """Answer the first prompts once and reckon from them. Nothing is stored.

    :raises ValueError: when none of them fits the context
    """
    single = replace(settings, num_candidates=1, batch_size=pilot, retries=0)
    talk = conversation(target, source, single)
    seeds = plain_seeds(seeds, marks(target, source.tokenizer))
    referee = Referee(talk, single, None)
    tasks = next(batches(seeds, single, lambda: pilot))
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        log = Store(folder).candidates("pilot", {})
        bar = stack.enter_context(tqdm(desc="FAQ: pilot", total=len(tasks)))
        generator = stack.enter_context(source.open())
        opened = replace(source, open=lambda: nullcontext(generator))
        writer = Writer(opened, single, talk, log, stack, bar)
        began = time.monotonic()
        answered = writer.answer(tasks)
        seconds = time.monotonic() - began
    sizes = []
    for task, chains in zip(tasks, answered, strict=True):
        entrants = referee.admit(task, chains)
        sizes += [entrant.size for entrant in entrants]
    counts = referee.outcome.counts
    asked = counts["candidates"]
    if not asked:
        raise ValueError(
            f"none of the {len(tasks)} prompts of the pilot fits the context; give "
            "shorter seeds or a larger sequence_length"
        )
    # with no valid answer at all the best guess is that of one in the next
    valid = max(len(sizes), 1) / len(tasks)
    size = sum(sizes) / len(sizes) if sizes else settings.sampling.max_new_tokens
    missed = (1 - valid) ** settings.num_candidates
    filled = 1 - missed ** (settings.retries + 1)
    prompts = math.ceil(settings.token_budget / (size * filled))
    tries = sum(missed**attempt for attempt in range(settings.retries + 1))
    scale = prompts * settings.num_candidates * tries / len(tasks)
    return Plan(
        prompts=prompts,
        requests=math.ceil(asked * scale),
        prompt_tokens=math.ceil(counts["tokens_prompted"] * scale),
        answer_tokens=math.ceil(counts["tokens_generated"] * scale),
        seconds=seconds * scale,
        valid=len(sizes) / len(tasks),
        truncated=counts["candidates_truncated"] / asked,
    )
