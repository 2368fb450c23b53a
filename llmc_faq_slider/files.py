"""Files that survive a kill at any moment: written whole or not at all, one owner."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

__all__ = [
    "FolderBusyError",
    "WriteError",
    "exclusive",
    "file_hash",
    "settle",
    "write_json",
    "writing",
]


class FolderBusyError(RuntimeError):
    """Another process works in the same folder."""


class WriteError(RuntimeError):
    """A file could not be written; what was written before is intact."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Context in which ``path`` is written.

    :raises WriteError: if the disk is full, or the folder cannot be written to
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(
            f"{path} cannot be written: {error}. What was saved before is intact. "
            "Make room on the disk, or name a folder that can be written to, and run "
            "the same command again."
        ) from error


@contextmanager
def exclusive(folder: Path, advice: str) -> Iterator[None]:
    """
    Keep a folder to this process, which may end in any way.

    :param advice: ends the message to whoever comes second
    :raises FolderBusyError: while another process has the folder
    :raises WriteError: if it cannot be made
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusyError(
                f"{folder} is in use by process {_owner(lock)}. Wait for it to end, "
                f"or {advice}."
            ) from None
        with writing(folder):
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        yield


def file_hash(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in one step."""
    part = path.with_name(path.name + ".part")
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    part.write_text(text, encoding="utf-8")
    settle(part, path)


def settle(part: Path, path: Path) -> None:
    """Put a finished file in its place in one step that survives a power cut."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    # The new name is in the folder, which is a file of its own.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return file.read(20).strip() or "of unknown number"
