"""JSON records with checksums, so that a changed byte is noticed when they are read."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from loguru import logger
from pydantic import TypeAdapter, ValidationError

from llmc_faq_slider.files import writing

#: the field that holds the checksum of all the others
SEAL = "checksum"
#: where the files of the stage cannot be written
REMEDY = "give the data stage another `cache_dir`."
_DIGITS = 16
R = TypeVar("R")


class BrokenSeal(ValueError):
    """A record is not what was written."""


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its checksum."""
    return {**record, SEAL: _checksum(record)}


def unseal(record: Any) -> dict[str, Any]:
    """The record without its checksum.

    :raises BrokenSeal: if it is no object, has no checksum, or another one
    """
    if not isinstance(record, dict):
        raise BrokenSeal(f"it is a {type(record).__name__}, not an object")
    content = {key: value for key, value in record.items() if key != SEAL}
    if SEAL not in record:
        raise BrokenSeal("it has no checksum")
    if record[SEAL] != _checksum(content):
        raise BrokenSeal("it does not match its checksum")
    return content


def _checksum(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def read_records(path: Path, kind: type[R]) -> Iterator[R]:
    """Records of a log; an incomplete last line is cut off the file.

    Lines of earlier versions have no checksum and are taken if they are well formed.
    """
    if not path.is_file():
        return
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        logger.warning(f"FAQ: cut off an incomplete last line of {path}")
        os.truncate(path, len(whole))
    adapter = TypeAdapter(kind)
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or SEAL in record:
                record = unseal(record)
            yield adapter.validate_python(record)
        except ValueError as error:
            raise _spoilt(path, number, error) from error


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record and wait until it is on disk.

    :raises FolderError: when it cannot be written
    """
    line = json.dumps(seal(record)).encode() + b"\n"
    with writing(path.parent, REMEDY), path.open("ab") as file:
        size = file.tell()
        try:
            # one write, so that a kill leaves at most one incomplete line, at the end
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            _cut(path, size)
            raise


def _cut(path: Path, size: int) -> None:
    """Take half a line away again, so that the next one starts on its own."""
    with suppress(OSError):
        os.truncate(path, size)


def _spoilt(path: Path, number: int, error: ValueError) -> ValueError:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        reason = f"{field}: {first['msg']}"
    else:
        reason = str(error)
    return ValueError(
        f"line {number} of {path} cannot be read ({reason}); remove the file to have "
        "its content made again"
    )
