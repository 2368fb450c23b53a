"""From a seed to the messages the generator answers. The wording is ours."""

import hashlib
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.seeds import Seed

PROMPT_VERSION = "faq-wrap-v1"

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


def to_messages(
    seed: Seed, wrapping: Wrapping, tokenizer: PreTrainedTokenizerBase
) -> list[Message]:
    """Messages that end with a user turn.

    Of a chat only a leading system turn and the first user turn are kept; later
    turns depend on answers that are being replaced.
    """
    if seed.kind == "messages":
        first = next(content for role, content in seed.messages if role == "user")
        head = [
            {"role": role, "content": content}
            for role, content in seed.messages[:1]
            if role == "system"
        ]
        return [*head, _user(first + (_SHOW_REASONING if wrapping.reasoning else ""))]
    if seed.kind == "prompt":
        return [_user(seed.text + (_SHOW_REASONING if wrapping.reasoning else ""))]
    passage = first_tokens(seed.text, wrapping.passage_tokens, tokenizer)
    reasoning = _PASSAGE_REASONING if wrapping.reasoning else ""
    return [_user(_PASSAGE.format(passage=passage, reasoning=reasoning))]


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
