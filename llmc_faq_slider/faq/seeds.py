"""Seeds: what the generator is asked about, from a file, a hub or token rows."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from datasets import Dataset, load_dataset
from loguru import logger
from transformers import PreTrainedTokenizerBase

from llmc_faq_slider.faq.seed_records import Seed, UnreadableRecord, parse_record

SHIPPED = Path(__file__).with_name("seed_prompts.jsonl")


def shipped_seeds() -> list[Seed]:
    """The varied set of prompts that comes with the package."""
    return load_seeds(str(SHIPPED))


def load_seeds(source: str, split: str | None = None) -> list[Seed]:
    """Read seeds from a local file or from a data set hub.

    Columns, first match wins: ``messages``/``conversations`` and other words for a
    chat, whose turns name their speakers as ``role`` or ``from``;
    ``prompt``/``question``/``instruction`` (+ ``input``; a request, or a chat of two
    turns with ``completion``/``response``/``answer``/``output``; a list of messages is
    a chat), ``text`` (a passage). ``source``/``topic``/``domain`` names the part of a
    mixture. In a ``.txt`` file passages are separated by blank lines. Lone surrogates,
    which no encoder takes, are replaced.

    A record that is none of these, or holds no text, is left out: a warning counts
    them and names the first by file and number.

    :param source: path of a json, jsonl, txt or parquet file, or a hub name
    :param split: split of a hub data set, "train" when None
    :return: seeds without repeats, in source order
    :raises ValueError: for an unknown file type, or when no record is a seed
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
    seeds: dict[str, Seed] = {}
    left_out = []
    for number, record in enumerate(records, start=1):
        try:
            seed = parse_record(record)
            if not seed.has_text:
                raise UnreadableRecord("it holds no text of a user")
            seeds.setdefault(seed.id, seed)
        except UnreadableRecord as error:
            left_out.append(f"record {number}: {error}")
    if not seeds:
        reason = f"; {left_out[0]}" if left_out else ""
        raise ValueError(f"seeds: {source!r} holds no text to regenerate from{reason}")
    if left_out:
        logger.warning(
            f"seeds: {len(left_out)} of {number} records of {source!r} are left out, "
            f"the first is {left_out[0]}"
        )
    return list(seeds.values())


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
    unique = list({seed.id: seed for seed in seeds if seed.has_text}.values())
    if not unique:
        raise ValueError(
            "seeds: the data set given to oneshot holds no text to regenerate from"
        )
    return unique


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


def _read_file(path: Path) -> Iterable[Any]:
    if path.suffix == ".jsonl":
        return list(_json_lines(_text(path), path))
    if path.suffix == ".json":
        return _json_records(_text(path), path)
    if path.suffix == ".txt":
        passages = re.split(r"\n[^\S\n]*\n", _text(path))
        return [passage for passage in passages if passage.strip()]
    if path.suffix == ".parquet":
        return _parquet(path)
    raise ValueError(
        f"seeds: cannot read {path.name}: use a .json, .jsonl, .txt or .parquet file"
    )


def _text(path: Path) -> str:
    """Text of a file in UTF-8, or in UTF-16 if a byte order mark says so."""
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"seeds: {path} is not UTF-8 text: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_records(text: str, path: Path) -> list[Any]:
    """Records of a list, of an object of columns, or of one object a line."""
    try:
        content = _json(text, str(path))
    except ValueError:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) < 2 or not lines[0].strip().endswith("}"):
            raise
        return list(_json_lines(text, path))
    if isinstance(content, list):
        return content
    if not isinstance(content, Mapping):
        raise ValueError(
            f"seeds: {path} holds a {type(content).__name__}, not a list of records"
        )
    columns = list(content.values())
    if all(isinstance(column, list) for column in columns):
        if len(columns) == 1 and all(isinstance(row, Mapping) for row in columns[0]):
            return columns[0]
        if len({len(column) for column in columns}) == 1:
            return [
                dict(zip(content, row, strict=True))
                for row in zip(*columns, strict=True)
            ]
    return [content]


def _json_lines(text: str, path: Path) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json(line, f"line {number} of {path}")


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
