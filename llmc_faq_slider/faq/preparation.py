"""From seeds to token prompts, in the fixed order and batches they are answered in."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.generators import GeneratorSource
from llmc_faq_slider.faq.prompts import Wrapping, original_text, to_messages
from llmc_faq_slider.faq.rendering import (
    encode,
    has_thinking_switch,
    opens_thinking,
    primed_ids,
    prompt_text,
    template_text,
)
from llmc_faq_slider.faq.seeds import Seed
from llmc_faq_slider.faq.settings import CONTINUATION_TOKENS, Settings

#: how often the whole seed set may be answered anew when it is short of tokens
MAX_ROUNDS = 16


@dataclass(frozen=True)
class Prompt:
    """A seed as token prompts.

    :param id: seed id, with ``#round`` after the first round
    :param generator_ids: what the generator continues
    :param target_ids: the same rendered with the target's template
    :param primed: answer ids the generator's template had already written
    :param inside_thinking: the generator's prompt ends inside a think block
    """

    id: str
    seed: Seed
    generator_ids: list[int]
    target_ids: list[int]
    primed: list[int]
    inside_thinking: bool


@dataclass(frozen=True)
class Conversation:
    """How both models are addressed; fixed for a run.

    :param target: the target's tokenizer
    :param speaker: tokenizer whose template the generator reads
    :param is_chat: False for a target without chat template: text is continued
    :param enable_thinking: value of the template's switch, None if it has none
    :param wrapping: how seeds become messages
    """

    target: PreTrainedTokenizerBase
    speaker: PreTrainedTokenizerBase
    is_chat: bool
    enable_thinking: bool | None
    wrapping: Wrapping


def conversation(
    target: PreTrainedTokenizerBase, source: GeneratorSource, settings: Settings
) -> Conversation:
    """Decide templates, thinking switch and wording once."""
    is_chat = template_text(target) is not None
    has_own = template_text(source.tokenizer) is not None
    speaker = source.tokenizer if has_own else target
    thinking = settings.enable_thinking
    if thinking is None and is_chat and has_thinking_switch(speaker):
        thinking = settings.chain_of_thought
    probe = [{"role": "user", "content": "?"}]
    thinks = is_chat and (
        opens_thinking(prompt_text(speaker, probe, thinking))
        or (thinking is True and has_thinking_switch(speaker))
    )
    reasoning = settings.chain_of_thought and is_chat and not thinks
    wrapping = Wrapping(settings.passage_tokens, reasoning)
    return Conversation(target, speaker, is_chat, thinking, wrapping)


def prepare(seed: Seed, round_index: int, talk: Conversation) -> Prompt:
    """Token prompts of one seed."""
    prompt_id = seed.id if round_index == 0 else f"{seed.id}#{round_index}"
    if not talk.is_chat:
        ids = list(talk.target(original_text(seed))["input_ids"])[:CONTINUATION_TOKENS]
        return Prompt(prompt_id, seed, ids, ids, [], False)
    messages = to_messages(seed, talk.wrapping, talk.target)
    asked = prompt_text(talk.speaker, messages, talk.enable_thinking)
    shown = prompt_text(talk.target, messages, talk.enable_thinking)
    return Prompt(
        prompt_id,
        seed,
        encode(talk.speaker, asked),
        encode(talk.target, shown),
        primed_ids(talk.target, asked, shown),
        opens_thinking(asked),
    )


def batches(
    seeds: Sequence[Seed], settings: Settings
) -> Iterator[list[tuple[Seed, int]]]:
    """Batches of ``(seed, round)``, a pure function of seed ids, seed and batch size.

    Seeds come in an order shuffled by hash, so every batch is a varied one.
    """

    def place(seed: Seed) -> str:
        return hashlib.sha256(f"{settings.seed}:{seed.id}".encode()).hexdigest()

    ordered = sorted(seeds, key=place)
    for round_index in range(MAX_ROUNDS):
        for start in range(0, len(ordered), settings.batch_size):
            part = ordered[start : start + settings.batch_size]
            yield [(seed, round_index) for seed in part]


def fits(prompt: Prompt, context: int | None, settings: Settings) -> bool:
    """Whether a prompt leaves room for a valid answer."""
    longest = max(settings.sequence_length, 512)
    if context is not None:
        longest = min(longest, context - settings.gates.min_response_tokens)
    return 0 < len(prompt.generator_ids) <= longest


def original(seed: Seed, talk: Conversation, max_tokens: int) -> list[int] | None:
    """Ids of the seed as it was given, or None for a bare request without answer."""
    if seed.kind == "text":
        return list(talk.target(seed.text)["input_ids"])[:max_tokens]
    if seed.kind == "messages" and talk.is_chat and seed.messages[-1][0] == "assistant":
        turns = [{"role": role, "content": content} for role, content in seed.messages]
        text = talk.target.apply_chat_template(turns, tokenize=False)
        return encode(talk.target, str(text))[:max_tokens]
    return None
