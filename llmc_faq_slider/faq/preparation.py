"""From seeds to token prompts, in the fixed order and batches they are answered in."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.generators import GeneratorSource, Request
from llmc_faq_slider.faq.prompts import (
    Message,
    Wrapping,
    original_text,
    to_messages,
    turns,
)
from llmc_faq_slider.faq.rendering import (
    encode,
    has_thinking_switch,
    opens_thinking,
    primed_ids,
    prompt_text,
    template_text,
)
from llmc_faq_slider.faq.sampling import row_seed
from llmc_faq_slider.faq.seeds import Seed
from llmc_faq_slider.faq.settings import CONTINUATION_TOKENS, Settings
from llmc_faq_slider.faq.store import Candidate

_PLAIN_ROLES = {"user", "assistant"}
#: how often the whole seed set may be answered anew when it is short of tokens
MAX_ROUNDS = 16


@dataclass(frozen=True)
class Task:
    """A seed to be answered, for the ``round``-th time, in the ``attempt``-th try."""

    seed: Seed
    round: int = 0
    attempt: int = 0

    @property
    def id(self) -> str:
        again = f"#{self.round}" if self.round else ""
        return self.seed.id + again + "~" * self.attempt


@dataclass(frozen=True)
class Prompt:
    """One assistant turn to be written, as token prompts.

    :param id: task id, with ``/turn`` after the first turn
    :param generator_ids: what the generator continues
    :param target_ids: the same rendered with the target's template
    :param primed: answer ids the generator's template had already written
    :param inside_thinking: the generator's prompt ends inside a think block
    :param messages: what was rendered, None where a text is continued
    """

    id: str
    generator_ids: list[int]
    target_ids: list[int]
    primed: list[int]
    inside_thinking: bool
    messages: list[Message] | None


@dataclass(frozen=True)
class Turn:
    """One assistant turn as the generator wrote it.

    :param body: answer ids with what the template primed, without the end of turn
    :param text: the same decoded, special tokens included
    """

    prompt: Prompt
    candidate: Candidate
    body: list[int]
    text: str


@dataclass(frozen=True)
class Conversation:
    """How both models are addressed; fixed for a run.

    :param target: the target's tokenizer
    :param speaker: tokenizer the generator reads, with the template that is used
    :param is_chat: False for a target without chat template: text is continued
    :param enable_thinking: value of the template's switch, None if it has none
    :param wrapping: how seeds become messages
    :param shares_tokens: both tokenizers are the same but for the template
    """

    target: PreTrainedTokenizerBase
    speaker: PreTrainedTokenizerBase
    is_chat: bool
    enable_thinking: bool | None
    wrapping: Wrapping
    shares_tokens: bool = True


def conversation(
    target: PreTrainedTokenizerBase, source: GeneratorSource, settings: Settings
) -> Conversation:
    """Decide templates, thinking switch and wording once.

    :raises ValueError: for a generator with other tokens and no chat template
    """
    is_chat = template_text(target) is not None
    has_own = template_text(source.tokenizer) is not None
    if is_chat and not has_own and not source.shares_tokens:
        raise ValueError(
            "the generator has another tokenizer than the target and no chat template "
            "of its own, so it cannot be addressed; choose an instruct model"
        )
    speaker = source.tokenizer if has_own or not is_chat else target
    thinking = settings.enable_thinking
    if thinking is None and is_chat and has_thinking_switch(speaker):
        thinking = settings.chain_of_thought is not False
    probe = [{"role": "user", "content": "?"}]
    thinks = is_chat and (
        opens_thinking(prompt_text(speaker, probe, thinking))
        or (thinking is True and has_thinking_switch(speaker))
    )
    reasoning = settings.chain_of_thought is True and is_chat and not thinks
    wrapping = Wrapping(settings.passage_tokens, reasoning)
    return Conversation(
        target, speaker, is_chat, thinking, wrapping, source.shares_tokens
    )


def prepare(task: Task, before: Sequence[Turn], talk: Conversation) -> Prompt | None:
    """Token prompts of the turn that comes after those before, None if none is left.

    Where the rendered chat goes on from an earlier turn, so do its ids: what was drawn
    is not tokenised again.
    """
    prompt_id = f"{task.id}/{len(before)}" if before else task.id
    if not talk.is_chat:
        return None if before else _continuation(task, talk)
    said = turns(task.seed, talk.wrapping, talk.target)
    if len(before) >= len(said):
        return None
    answers = [
        str(talk.target.decode(turn.body, skip_special_tokens=True)) for turn in before
    ]
    messages = to_messages(said, answers)
    asked = prompt_text(talk.speaker, messages, talk.enable_thinking)
    shown = prompt_text(talk.target, messages, talk.enable_thinking)
    asked_before: list[int] = []
    shown_before: list[int] = []
    if before:
        last = before[-1]
        shown_before = [*last.prompt.target_ids, *last.body]
        if talk.shares_tokens:
            answer = last.body[len(last.prompt.primed) :]
            asked_before = [*last.prompt.generator_ids, *answer]
    return Prompt(
        prompt_id,
        _encode_after(talk.speaker, asked_before, asked),
        _encode_after(talk.target, shown_before, shown),
        primed_ids(talk.target, asked, shown),
        opens_thinking(asked),
        messages,
    )


def _continuation(task: Task, talk: Conversation) -> Prompt:
    """The first tokens of a text, for a model without a chat template."""
    text = original_text(task.seed)
    ids = list(talk.target(text)["input_ids"])[:CONTINUATION_TOKENS]
    asked_ids = ids
    if not talk.shares_tokens:
        prefix = str(talk.target.decode(ids, skip_special_tokens=True))
        asked_ids = list(talk.speaker(prefix)["input_ids"])
    return Prompt(task.id, asked_ids, ids, [], False, None)


def _encode_after(
    tokenizer: PreTrainedTokenizerBase, before: list[int], text: str
) -> list[int]:
    """Ids of a text that begin with given ones, if these are its beginning."""
    prefix = str(tokenizer.decode(before)) if before else ""
    if not text.startswith(prefix):
        return encode(tokenizer, text)
    return [*before, *encode(tokenizer, text[len(prefix) :])]


def request(prompt: Prompt, index: int, talk: Conversation, seed: int) -> Request:
    """What is asked for candidate ``index`` of a prompt."""
    return Request(
        prompt.generator_ids,
        row_seed(seed, prompt.id, index),
        prompt.messages,
        talk.enable_thinking,
        prompt.inside_thinking,
    )


def batches(
    seeds: Sequence[Seed], settings: Settings, needed: Callable[[], int]
) -> Iterator[list[Task]]:
    """Batches of tasks, the whole seed set once per round.

    Seeds come in an order shuffled by hash, so every batch is a varied one.

    :param needed: prompts that are still wanted, asked before every batch; a batch is
        no larger, for the last one would be answered in vain
    """

    def place(seed: Seed) -> str:
        return hashlib.sha256(f"{settings.seed}:{seed.id}".encode()).hexdigest()

    ordered = sorted(seeds, key=place)
    for round_index in range(MAX_ROUNDS):
        tasks = [Task(seed, round_index) for seed in ordered]
        while tasks:
            size = min(settings.batch_size, needed())
            yield tasks[:size]
            del tasks[:size]


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
    roles = [role for role, _ in seed.messages]
    if talk.is_chat and roles[-1:] == ["assistant"] and set(roles) <= _PLAIN_ROLES:
        messages = [{"role": role, "content": said} for role, said in seed.messages]
        text = talk.target.apply_chat_template(messages, tokenize=False)
        return encode(talk.target, str(text))[:max_tokens]
    return None
