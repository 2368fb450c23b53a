"""Keeps what data says in a user's turn: no system turn, no mark of a chat template.

Tokenisers turn the text ``<|im_start|>`` into the token that opens a turn wherever it
stands. Data that holds it could so write a system turn of its own.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from jinja2 import TemplateError
from loguru import logger
from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.rendering import control_ids, template_text
from llmc_faq_slider.faq.seeds import Seed

_PROBE = "probe"


def marks(*tokenizers: PreTrainedTokenizerBase) -> frozenset[str]:
    """Texts that only a chat template may write.

    Control tokens, and what opens a system turn in templates that mark it with ordinary
    text, such as ``[INST] <<SYS>>``.
    """
    found: set[str] = set()
    for tokenizer in tokenizers:
        ids = sorted(control_ids(tokenizer))
        control = {str(tokenizer.decode([index])).strip() for index in ids}
        opening = without(_system_opening(tokenizer), control)
        found |= control | {word for word in opening.split() if word[0] in "<[{|"}
    return frozenset(found - {""})


def without(text: str, marks: Collection[str]) -> str:
    """A text with all marks taken out, also those that come together thereby."""
    pattern = "|".join(
        re.escape(mark) for mark in sorted(marks, key=lambda m: (-len(m), m))
    )
    while pattern and (shorter := re.sub(pattern, "", text)) != text:
        text = shorter
    return text


def plain_seeds(seeds: Iterable[Seed], marks: Collection[str]) -> list[Seed]:
    """Seeds without marks, and with system messages put in front of the next user's.

    Those in which nothing is left to ask are dropped, and a warning counts them.
    """
    plain: dict[str, Seed] = {}
    empty = 0
    for seed in seeds:
        kept = replace(
            seed,
            text=_cleaned(seed.text, marks),
            messages=_without_system(seed.messages, marks),
        )
        if kept.has_text:
            plain.setdefault(kept.id, kept)
        else:
            empty += 1
    if empty:
        logger.warning(
            f"FAQ: {empty} seeds hold nothing but control strings of a chat template "
            "and are left out."
        )
    return list(plain.values())


def _cleaned(text: str, marks: Collection[str]) -> str:
    shorter = without(text, marks)
    return text if shorter == text else shorter.strip()


def _without_system(
    messages: Sequence[tuple[str, str]], marks: Collection[str]
) -> tuple[tuple[str, str], ...]:
    waiting: list[str] = []
    turns: list[tuple[str, str]] = []
    for role, content in messages:
        said = _cleaned(content, marks)
        if role == "system":
            waiting.append(said)
        elif role == "user":
            turns.append((role, "\n\n".join(filter(None, [*waiting, said]))))
            waiting = []
        else:
            turns.append((role, said))
    return tuple(turns)


def _system_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a chat template writes before the text of a system turn."""
    if template_text(tokenizer) is None:
        return ""
    chat = [
        {"role": "system", "content": _PROBE},
        {"role": "user", "content": "?"},
    ]
    try:
        shown = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except TemplateError:  # it knows no system turn
        return ""
    opening, found, _ = shown.partition(_PROBE)
    return opening if found else ""
