"""One record of a data set, in any of the forms that chats come in, as a seed."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Seed", "UnreadableRecord", "parse_record"]

MESSAGES_COLUMNS = (
    "messages",
    "conversations",
    "conversation",
    "dialogue",
    "dialog",
    "chat",
    "turns",
)
PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "problem")
_ANSWER_COLUMNS = ("completion", "response", "answer", "output")
_SOURCE_COLUMNS = ("source", "topic", "domain")
_SPEAKER_FIELDS = ("role", "from", "speaker", "author", "sender")
_CONTENT_FIELDS = ("content", "value", "text", "message", "utterance")
_SPEAKERS = {
    "user": "user human prompter person customer client questioner question instruction"
    " input usr query",
    "assistant": "assistant gpt chatgpt bot chatbot model ai llm answer response output"
    " bard bing claude gemini agent helper machine robot",
    "system": "system developer sys systemprompt",
    "tool": "tool tools function functioncall functionresponse functionresult"
    " observation toolcall toolcalls toolresponse toolresult ipython environment",
}
_ROLES = {name: role for role, names in _SPEAKERS.items() for name in names.split()}


class UnreadableRecord(ValueError):
    """A record that is no prompt, passage or chat; the message says why."""


@dataclass(frozen=True)
class Seed:
    """One seed.

    :param kind: ``prompt`` is a request, ``text`` a passage, ``messages`` a chat
    :param text: the request or the passage; empty for ``messages``
    :param messages: the chat as ``(role, content)`` pairs; empty for the others
    :param source: which part of a mixture it comes from; no part of its identity
    """

    kind: Literal["prompt", "text", "messages"]
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    source: str = field(default="", compare=False)

    @property
    def id(self) -> str:
        """16 hex digits of the content's hash, so order and source do not matter."""
        content = json.dumps([self.kind, self.text, self.messages], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def has_text(self) -> bool:
        """Whether there is something to ask or to continue."""
        return bool(self.text) or any(r == "user" and c for r, c in self.messages)


def parse_record(record: Any) -> Seed:
    """
    The seed that a record holds; names of columns and speakers in any case.

    :param record: a passage, or an object with a chat, a prompt or a text
    :raises UnreadableRecord: for any other
    """
    if isinstance(record, str):
        return Seed("text", text=_clean(record))
    if not isinstance(record, Mapping):
        raise UnreadableRecord(f"it is no object but of type {type(record).__name__}")
    columns = {str(name).strip().lower(): value for name, value in record.items()}
    part = _clean(
        next((str(columns[c]) for c in _SOURCE_COLUMNS if columns.get(c)), "")
    )
    for column in MESSAGES_COLUMNS:
        if columns.get(column):
            return Seed("messages", messages=_chat(columns[column]), source=part)
    for column in PROMPT_COLUMNS:
        asked = columns.get(column)
        if asked and _is_chat(asked):
            return Seed("messages", messages=_chat(asked), source=part)
        if asked:
            return _request(str(asked), columns, part)
    if "text" in columns:
        passage = columns["text"]
        if _is_chat(passage):
            return Seed("messages", messages=_chat(passage), source=part)
        return Seed(
            "text", text="" if passage is None else _clean(str(passage)), source=part
        )
    expected = ", ".join((*MESSAGES_COLUMNS, *PROMPT_COLUMNS, "text"))
    raise UnreadableRecord(
        f"it has the columns {_shown(sorted(columns))}; expected one of {expected}"
    )


def _request(asked: str, columns: Mapping[str, Any], source: str) -> Seed:
    """A prompt, or a chat of two turns if its answer is there."""
    parts = (asked, str(columns.get("input") or ""))
    text = "\n\n".join(_clean(p) for p in parts if p).strip()
    answers = (columns.get(c) for c in _ANSWER_COLUMNS)
    answer = next((a for a in answers if isinstance(a, str) and a), None)
    if answer is None:
        return Seed("prompt", text=text, source=source)
    chat = (("user", text), ("assistant", _clean(answer)))
    return Seed("messages", messages=chat, source=source)


def _is_chat(value: Any) -> bool:
    """Whether it is messages and no text, also as JSON inside a string."""
    if not isinstance(value, str):
        return isinstance(value, Mapping | Sequence)
    written = _from_json(value)
    return isinstance(written, list) and all(
        isinstance(turn, Mapping) and any(f in turn for f in _SPEAKER_FIELDS)
        for turn in written
    )


def _from_json(text: str) -> Any:
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _chat(turns: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(turns, str):
        written = _from_json(turns)
        if written is None:
            raise UnreadableRecord(f"its chat is the text {_shown(turns)}")
        turns = written
    if isinstance(turns, Mapping):
        turns = _transposed(turns)
    if not isinstance(turns, Sequence):
        raise UnreadableRecord(f"its chat is of type {type(turns).__name__}")
    if turns and all(isinstance(turn, str) for turn in turns):
        # only what was said, the user first
        return tuple(
            ("assistant" if index % 2 else "user", _clean(said))
            for index, said in enumerate(turns)
        )
    return tuple(_turn(turn) for turn in turns)


def _transposed(turns: Mapping[str, Any]) -> list[Any]:
    """A structure of lists, as ``datasets`` stores chats, turn by turn."""
    lists = {
        name: value
        for name, value in turns.items()
        if isinstance(value, Sequence) and not isinstance(value, str)
    }
    speakers = next((lists[f] for f in _SPEAKER_FIELDS if f in lists), None)
    if speakers is None:
        return [turns]
    return [
        {name: value[i] for name, value in lists.items() if i < len(value)}
        for i in range(len(speakers))
    ]


def _turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise UnreadableRecord(
            f"its chat has a turn that is of type {type(turn).__name__}, not an object "
            "with role and content"
        )
    speaker = next((turn[f] for f in _SPEAKER_FIELDS if turn.get(f)), None)
    if isinstance(speaker, Mapping):
        speaker = speaker.get("role") or speaker.get("name")
    role = _ROLES.get(re.sub(r"[\W\d_]+", "", str(speaker).lower()))
    if role is None:
        raise UnreadableRecord(
            f"its chat has the speaker {_shown(speaker)}; known are user, assistant, "
            "system, tool and their usual other names"
        )
    content = next((turn[f] for f in _CONTENT_FIELDS if turn.get(f)), "")
    return role, _clean(_plain(content))


def _plain(content: Any) -> str:
    """Text of a turn; of content in parts, that of its text parts."""
    if isinstance(content, Mapping):
        content = content.get("parts") or content.get("text") or ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [
            part.get("text") or "" if isinstance(part, Mapping) else part
            for part in content
        ]
        return "\n".join(str(part) for part in parts if part)
    return str(content)


def _clean(text: str) -> str:
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.strip()


def _shown(value: Any, longest: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
