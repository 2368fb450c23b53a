"""Folders that files go to: room, permission, and one writer at a time."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "FolderBusyError",
    "FolderError",
    "check_room",
    "held_folder",
    "room_error",
    "writing",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


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
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(folder, remedy) from error
        if error.errno is None or isinstance(error, BlockingIOError):
            raise
        raise FolderError(
            f"{folder} cannot be written to: {os.strerror(error.errno)}. Correct "
            f"that, or {remedy}"
        ) from error


def room_error(error: Exception, folder: Path) -> FolderError | None:
    """What to say of an error while a checkpoint was written, if the disk is full.

    safetensors tells it in words only.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number not in _FULL and not any(os.strerror(n) in str(error) for n in _FULL):
        return None
    return _no_room(
        folder,
        "save the model elsewhere: one that was given to oneshot as an object is "
        "quantised in memory, and its save_pretrained(folder, save_compressed=True) "
        "writes it.",
    )


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
def held_folder(folder: Path, remedy: str) -> Iterator[None]:
    """Keep other processes of this package from writing to a folder.

    The folder itself is locked, so nothing is left in it, however this process ends.

    :raises FolderBusyError: while another process holds it
    """
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
