"""Files that survive a kill at any moment, and folders that cannot take them.

A file is written whole or not at all; a folder has room, lets itself be written to, and
has one writer at a time.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = [
    "CACHE_VARIABLE",
    "FolderBusyError",
    "FolderError",
    "cache_folder",
    "check_room",
    "exclusive",
    "file_hash",
    "room_error",
    "settle",
    "write_json",
    "writing",
]

CACHE_VARIABLE = "LLMC_FAQ_SLIDER_CACHE"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def cache_folder(name: str) -> Path:
    """Folder for files of one kind that no user has named."""
    base = os.environ.get(CACHE_VARIABLE) or "~/.cache/llmc_faq_slider"
    return Path(base, name).expanduser()


class FolderError(OSError):
    """A folder cannot be written to."""


class FolderBusyError(RuntimeError):
    """Another process writes to the folder."""


@contextmanager
def writing(folder: Path, remedy: str) -> Iterator[None]:
    """Say in a sentence why something could not be written.

    :param remedy: how to have it written elsewhere, a sentence
    :raises FolderError: for a full disk, missing rights, or a file in the way
    """
    try:
        yield
    except FolderError:
        raise
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise _no_room(folder, remedy) from error
        number = getattr(error, "errno", None)
        if number is None or isinstance(error, BlockingIOError):
            raise
        raise FolderError(
            f"{folder} cannot be written to: {os.strerror(number)}. Correct that, or "
            f"{remedy}"
        ) from error


def room_error(error: Exception, folder: Path) -> FolderError | None:
    """What to say of an error while a checkpoint was written, if the disk is full."""
    if not _is_full(error):
        return None
    return _no_room(
        folder,
        "save the model elsewhere: one that was given to oneshot as an object is "
        "quantised in memory, and its save_pretrained(folder, save_compressed=True) "
        "writes it.",
    )


def _is_full(error: Exception) -> bool:
    """safetensors tells it in words only."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(os.strerror(number) in str(error) for number in _FULL)


def _no_room(folder: Path, remedy: str) -> FolderError:
    return FolderError(
        f"There is no room left to write to {folder} ({_size(_free(folder))} free). "
        f"Free some, or {remedy}"
    )


def check_room(folder: Path, least: int, remedy: str) -> None:
    """Refuse to begin what cannot be written in the end.

    :param least: bytes that will be written at least
    :param remedy: see :func:`writing`
    :raises FolderError: if they do not fit, or the folder cannot be made or written to
    """
    with writing(folder, remedy):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "")
    free = _free(folder)
    if free < least:
        raise FolderError(
            f"{folder} has {_size(free)} of free space and at least {_size(least)} "
            f"will be written there. Free some, or {remedy}"
        )


@contextmanager
def exclusive(folder: Path, remedy: str) -> Iterator[None]:
    """Keep other processes of this package from writing to a folder.

    The folder itself is locked, so nothing is left in it, however this process ends.

    :raises FolderBusyError: while another process holds it
    :raises FolderError: if it cannot be made
    """
    with writing(folder, remedy):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusyError(
                f"Another process is writing to {folder}. Wait for it to end, or "
                f"{remedy}"
            ) from None
        yield
    finally:
        os.close(descriptor)


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


def _free(folder: Path) -> int:
    """Bytes free where a folder is or would be."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def _size(count: float) -> str:
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {_UNITS[-1]}"
