"""From a seed to the messages the generator answers. The wording is ours."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.seeds import Seed

PROMPT_VERSION = "faq-wrap-v2"

_PASSAGE = (
    "Below is a passage between two markers.\n"
    "<passage>\n{passage}\n</passage>\n"
    "{reasoning}Write a complete answer, in the language of the passage, that stands "
    "on its own: restate what the passage says, explain it and carry it further."
)
_PASSAGE_REASONING = (
    "First work out step by step what it says and what a careful reader would ask or "
    "conclude. "
)
_SHOW_REASONING = "\n\nThink step by step and show your reasoning before the answer."

Message = dict[str, str]


@dataclass(frozen=True)
class Wrapping:
    """How seeds are put to the generator.

    :param passage_tokens: tokens of a raw text that are shown
    :param reasoning: ask in words for reasoning (chain of thought for models whose
        template has no thinking mode of its own)
    """

    passage_tokens: int
    reasoning: bool


def turns(
    seed: Seed, wrapping: Wrapping, tokenizer: PreTrainedTokenizerBase
) -> list[list[Message]]:
    """What is said before each answer: one list of messages per assistant turn.

    The assistant turns of a chat are dropped, to be written anew one after another. A
    chat ends where another role than user and assistant comes in, because the calls
    that tools answer are not regenerated. Reasoning is asked for once, in the
    first user turn.
    """
    reasoning = _SHOW_REASONING if wrapping.reasoning else ""
    if seed.kind == "prompt":
        return [[_user(seed.text + reasoning)]]
    if seed.kind == "text":
        passage = first_tokens(seed.text, wrapping.passage_tokens, tokenizer)
        asked = _PASSAGE_REASONING if wrapping.reasoning else ""
        return [[_user(_PASSAGE.format(passage=passage, reasoning=asked))]]
    said: list[list[Message]] = [[]]
    for role, content in seed.messages:
        if role == "assistant":
            # an assistant that speaks first answers nothing
            if any(message["role"] == "user" for message in said[-1]):
                said.append([])
        elif role == "user":
            said[-1].append({"role": "user", "content": content})
        else:
            break
    asked_turns = [turn for turn in said if any(m["role"] == "user" for m in turn)]
    if asked_turns:
        first = next(m for m in asked_turns[0] if m["role"] == "user")
        first["content"] += reasoning
    return asked_turns


def to_messages(said: Sequence[list[Message]], answers: Sequence[str]) -> list[Message]:
    """The chat up to the turn that comes after ``answers``; ends with a user turn."""
    messages = []
    for turn, answer in zip(said, answers, strict=False):
        messages += [*turn, {"role": "assistant", "content": answer}]
    return [*messages, *said[len(answers)]]


def original_text(seed: Seed) -> str:
    """What a model without a chat template is given to continue."""
    if seed.kind == "messages":
        return next(content for role, content in seed.messages if role == "user")
    return seed.text


def first_tokens(text: str, count: int, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= count else str(tokenizer.decode(ids[:count]))


def wording_hash() -> str:
    """Hash of all prompt wording, for the manifest."""
    wording = "\0".join((PROMPT_VERSION, _PASSAGE, _PASSAGE_REASONING, _SHOW_REASONING))
    return hashlib.sha256(wording.encode()).hexdigest()


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
