"""Token-exact rendering of prompts and answers with a chat template."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.prompts import Message

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
_MARK = "marker"


@dataclass(frozen=True)
class Sample:
    """One rendered sample: token ids and, per id, 1 for answer and 0 for prompt."""

    input_ids: list[int]
    loss_mask: list[int]


def template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template in use, or None for a base model."""
    if not tokenizer.chat_template:
        return None
    return tokenizer.get_chat_template()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    text = template_text(tokenizer)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def has_thinking_switch(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the template reads ``enable_thinking``."""
    return "enable_thinking" in (template_text(tokenizer) or "")


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    enable_thinking: bool | None,
) -> str:
    """The rendered prompt, up to where the answer starts."""
    extra = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, **extra
    )
    return str(text)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of rendered text; the template has already placed special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id that closes an assistant turn; the end-of-text id without a template."""
    if template_text(tokenizer) is None:
        return tokenizer.eos_token_id
    turns = [
        {"role": "user", "content": _MARK},
        {"role": "assistant", "content": _MARK},
    ]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    tail = encode(tokenizer, text.rpartition(_MARK)[2].strip())
    special = set(control_ids(tokenizer))
    return tail[0] if tail and tail[0] in special else tokenizer.eos_token_id


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that only a template may place; think tags are not among them."""
    added = tokenizer.added_tokens_decoder.items()
    marked = {index for index, token in added if token.special}
    marked |= set(tokenizer.all_special_ids)
    think = set(tokenizer.convert_tokens_to_ids([THINK_OPEN, THINK_CLOSE]))
    return frozenset(marked - think)


def opens_thinking(prompt: str) -> bool:
    """True if the rendered prompt ends inside a think block."""
    return prompt.rstrip().endswith(THINK_OPEN)


def primed_ids(
    tokenizer: PreTrainedTokenizerBase, generator_prompt: str, target_prompt: str
) -> list[int]:
    """Opening tag that only the generator's template wrote, to move to the answer."""
    if opens_thinking(generator_prompt) and not opens_thinking(target_prompt):
        return encode(tokenizer, THINK_OPEN + "\n")
    return []


def render(
    prompt_ids: Sequence[int], body_ids: Sequence[int], end_id: int | None
) -> Sample:
    """Prompt + answer + one end of turn (none for a cut-off answer: ``end_id`` None).

    :param prompt_ids: ids of the target's rendered prompt
    :param body_ids: ids of the answer without its end of turn
    """
    tail = [] if end_id is None else [end_id]
    answer = [*body_ids, *tail]
    return Sample([*prompt_ids, *answer], [0] * len(prompt_ids) + [1] * len(answer))


def join(earlier: Sample, later: Sample) -> Sample | None:
    """One sample of two turns of a chat, if the later one begins with the earlier.

    None for templates that show an earlier answer in another form, without its
    reasoning for instance: then each turn is a sample of its own.
    """
    size = len(earlier.input_ids)
    if later.input_ids[:size] != earlier.input_ids:
        return None
    return Sample(later.input_ids, [*earlier.loss_mask, *later.loss_mask[size:]])
