"""Seeds: what the generator is asked about, from a file, a hub or token rows."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

SHIPPED = Path(__file__).with_name("seed_prompts.jsonl")

_MESSAGES_COLUMNS = ("messages", "conversations")
_PROMPT_COLUMNS = ("prompt", "question", "instruction")
_ANSWER_COLUMNS = ("completion", "response", "answer", "output")
_SOURCE_COLUMNS = ("source", "topic", "domain")
_ROLES = {"human": "user", "gpt": "assistant"}


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


def shipped_seeds() -> list[Seed]:
    """The varied set of prompts that comes with the package."""
    return load_seeds(str(SHIPPED))


def load_seeds(source: str, split: str | None = None) -> list[Seed]:
    """Read seeds from a local file or from a data set hub.

    Columns, first match wins: ``messages``/``conversations`` (a chat),
    ``prompt``/``question``/``instruction`` (+ ``input``; a request, or a chat of two
    turns with ``completion``/``response``/``answer``/``output``; a list of messages is
    a chat), ``text`` (a passage). ``source``/``topic``/``domain`` names the part of a
    mixture. In a ``.txt`` file passages are separated by blank lines. Lone surrogates,
    which no encoder takes, are replaced.

    :param source: path of a json, jsonl, txt or parquet file, or a hub name
    :param split: split of a hub data set, "train" when None
    :return: seeds without repeats, in source order
    :raises ValueError: for an unknown file type, missing columns or an empty source
    """
    path = Path(source).expanduser()
    if path.is_file():
        records: Iterable[Any] = _read_file(path)
    elif path.suffix in (".json", ".jsonl", ".txt", ".parquet") or path.is_dir():
        raise ValueError(
            f"seeds: no file at {source!r}. Give a json, jsonl, txt or parquet file "
            "or the name of a data set on the hub."
        )
    else:
        records = _from_hub(source, split or "train")
    seeds = [_parse(record, source) for record in records]
    return _unique(seeds, source)


def load_mixture(sources: Sequence[str], split: str | None = None) -> list[Seed]:
    """Read several sources, each a part of the mixture unless its records say more."""
    seeds: list[Seed] = []
    for source in sources:
        for seed in load_seeds(source, split):
            seeds.append(seed if seed.source else replace(seed, source=source))
    return list({seed.id: seed for seed in reversed(seeds)}.values())[::-1]


def seed_texts(seed: Seed) -> list[str]:
    """All that is said in a seed."""
    return [seed.text, *(content for _, content in seed.messages)]


def seeds_from_rows(rows: Any, tokenizer: PreTrainedTokenizerBase) -> list[Seed]:
    """Turn the already tokenised rows of a calibration loader into text seeds.

    A ``datasets.Dataset`` behind the loader is read directly and cut to the loader's
    size by content hash, so the result does not depend on an unseeded shuffle.

    :param rows: a ``torch.utils.data.DataLoader``
    :param tokenizer: the tokenizer that made the rows
    :raises ValueError: when the rows carry no ``input_ids``
    """
    stored = rows.dataset
    if isinstance(stored, Dataset) and "input_ids" in stored.column_names:
        token_rows = sorted(
            (list(ids) for ids in stored["input_ids"]),
            key=lambda ids: hashlib.sha256(repr(ids).encode()).digest(),
        )[: len(rows.sampler)]
    else:
        token_rows = [ids for batch in rows for ids in _unpadded(batch)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in token_rows]
    seeds = [Seed("text", text=str(text).strip()) for text in texts]
    return _unique(seeds, "the data set given to oneshot")


def seeds_hash(seeds: Iterable[Seed]) -> str:
    """Hash of a set of seeds, whatever their order."""
    return hashlib.sha256("".join(sorted(s.id for s in seeds)).encode()).hexdigest()


def _unpadded(batch: Any) -> list[list[int]]:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(
            "FAQModifier: the rows of the given data set carry no input_ids, so there "
            "is no text to regenerate. Give a text data set, or name one in `seeds`."
        )
    ids = torch.as_tensor(batch["input_ids"])
    mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids)))
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def _from_hub(name: str, split: str) -> Iterable[Any]:
    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"seeds: {name!r} is no file here, and its split {split!r} cannot be read "
            f"as a data set of the hub: {reason}"
        ) from error


def _read_file(path: Path) -> Iterable[Mapping[str, Any]]:
    if path.suffix == ".jsonl":
        lines = enumerate(_text(path).split("\n"), start=1)
        return [_json(line, f"line {n} of {path}") for n, line in lines if line.strip()]
    if path.suffix == ".json":
        content = _json(_text(path), str(path))
        if not isinstance(content, list):
            raise ValueError(
                f"seeds: {path} holds a {type(content).__name__}, not a list of records"
            )
        return content
    if path.suffix == ".txt":
        return [{"text": passage} for passage in _text(path).split("\n\n")]
    if path.suffix == ".parquet":
        return _parquet(path)
    raise ValueError(
        f"seeds: cannot read {path.name}: use a .json, .jsonl, .txt or .parquet file"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"seeds: {path} is not UTF-8 text: {error}") from error


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"seeds: {place} is no JSON: {error}") from error


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"seeds: {path} is no parquet file: {reason}") from error


def _parse(record: Any, source: str) -> Seed:
    if isinstance(record, str):
        return Seed("text", text=_clean(record))
    if not isinstance(record, Mapping):
        raise ValueError(f"seeds: {source!r} holds a record that is no object")
    part = next((str(record[c]) for c in _SOURCE_COLUMNS if record.get(c)), "")
    part = _clean(part)
    for column in _MESSAGES_COLUMNS:
        if record.get(column):
            chat = _chat(record[column], source)
            return Seed("messages", messages=chat, source=part)
    for column in _PROMPT_COLUMNS:
        asked = record.get(column)
        if asked and not isinstance(asked, str):
            return Seed("messages", messages=_chat(asked, source), source=part)
        if asked:
            parts = (asked, str(record.get("input") or ""))
            text = "\n\n".join(_clean(p) for p in parts if p).strip()
            answers = (record.get(c) for c in _ANSWER_COLUMNS)
            answer = next((a for a in answers if isinstance(a, str) and a), None)
            if answer is None:
                return Seed("prompt", text=text, source=part)
            chat = (("user", text), ("assistant", _clean(answer)))
            return Seed("messages", messages=chat, source=part)
    if "text" in record:
        passage = "" if record["text"] is None else str(record["text"])
        return Seed("text", text=_clean(passage), source=part)
    raise ValueError(
        f"seeds: {source!r} has the columns {sorted(record)}; expected one of "
        f"{', '.join((*_MESSAGES_COLUMNS, *_PROMPT_COLUMNS, 'text'))}"
    )


def _chat(turns: Any, source: str) -> tuple[tuple[str, str], ...]:
    chat = []
    for turn in turns if isinstance(turns, Sequence) else [turns]:
        if not isinstance(turn, Mapping):
            raise ValueError(
                f"seeds: {source!r} holds a chat whose turn is a "
                f"{type(turn).__name__}, not an object with role and content"
            )
        role = str(turn.get("role") or turn.get("from"))
        content = turn.get("content") or turn.get("value") or ""
        chat.append((_ROLES.get(role, _clean(role)), _clean(_plain(content))))
    return tuple(chat)


def _plain(content: Any) -> str:
    """Text of a turn; of content in parts, that of its text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [p.get("text") or "" for p in content if isinstance(p, Mapping)]
        return "\n".join(str(part) for part in parts if part)
    return str(content)


def _clean(text: str) -> str:
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.strip()


def _unique(seeds: Iterable[Seed], source: str) -> list[Seed]:
    filled = [
        s for s in seeds if s.text or any(r == "user" and c for r, c in s.messages)
    ]
    unique = list({seed.id: seed for seed in filled}.values())
    if not unique:
        raise ValueError(f"seeds: {source!r} holds no text to regenerate from")
    return unique
