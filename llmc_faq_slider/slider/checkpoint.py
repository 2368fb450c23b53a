"""The saved state of a stage: what a killed run needs to go on where it was.

A state is a record (``state-<number>.json``) and the tensors it names
(``<role>-<number>.safetensors``, with their sha256 in the record). Every save writes
files of new names and the record last, so that a kill, a full disk or a power cut
leaves the state before it as it was. The newest two states are kept, since what a
failing disk damages is what was written last.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmc_faq_slider.files import (
    exclusive,
    file_hash,
    settle,
    write_json,
    writing,
)

__all__ = ["Checkpoint", "StateError", "open_checkpoint"]

Record = dict[str, Any]

FORMAT = 1
SHOWN_CHARACTERS = 40
_REMEDY = (
    "name another `checkpoint_dir`, and run the same command again. What was saved "
    "before is intact."
)


class StateError(RuntimeError):
    """The saved state is damaged, or of another run."""


class Checkpoint:
    """
    The newest good state in a folder; see :func:`open_checkpoint`.

    :param folder: holds nothing but the states of one stage
    :param fingerprint: JSON-like facts that must be equal when a run goes on
    :raises StateError: if there are states and none is whole, or the newest was made
        under another fingerprint
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]):
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self._records: dict[int, Record] = {}
        self._number = -1
        self._read()

    @property
    def progress(self) -> Record | None:
        """What the newest state says of itself, None if there is no state."""
        return self._records[self._number]["progress"] if self._records else None

    def __contains__(self, role: str) -> bool:
        return bool(self._records) and role in self._records[self._number]["files"]

    def tensors(self, role: str) -> dict[str, Tensor]:
        """Tensors of the newest state, on the CPU."""
        name = self._records[self._number]["files"][role]["name"]
        return load_file(self.folder / name)

    def save(
        self,
        progress: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        drop: Collection[str] = (),
    ) -> None:
        """
        Write a state that follows the newest.

        :param progress: JSON-like
        :param tensors: new tensors by role and name; those of other roles stay
        :param drop: roles that are no longer needed
        :raises FolderError: if it cannot be written; the newest state then stays
        """
        number = max(self._numbers(), default=-1) + 1
        before = self._records[self._number]["files"] if self._records else {}
        files = {role: file for role, file in before.items() if role not in drop}
        for role, named in tensors.items():
            path = self.folder / f"{role}-{number:06d}.safetensors"
            part = path.with_name(path.name + ".part")
            with writing(self.folder, _REMEDY):
                save_file({n: t.cpu().contiguous() for n, t in named.items()}, part)
                files[role] = {"name": path.name, "sha256": file_hash(part)}
                settle(part, path)
        record = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "progress": dict(progress),
            "files": files,
        }
        path = self.folder / f"state-{number:06d}.json"
        with writing(self.folder, _REMEDY):
            write_json(path, record)
        kept = {number: record}
        if self._records:
            kept[self._number] = self._records[self._number]
        self._records, self._number = kept, number
        self._clear()

    def _numbers(self) -> list[int]:
        return [int(p.stem.split("-")[1]) for p in self.folder.glob("state-*.json")]

    def _read(self) -> None:
        damages: list[str] = []
        for number in sorted(self._numbers(), reverse=True):
            path = self.folder / f"state-{number:06d}.json"
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                damaged = self._damaged(record)
            except (ValueError, KeyError, TypeError) as error:
                record, damaged = {}, f"{path.name} cannot be read ({error!r})"
            if damaged is None:
                if damages:
                    logger.error(
                        f"{self.folder}: {damages[0]}. Going on from the state before."
                    )
                self._records, self._number = {number: record}, number
                self._compare(record)
                return
            damages.append(damaged)
        if damages:
            raise StateError(
                f"The saved state in {self.folder} is damaged: {'; '.join(damages)}. "
                "Put the file back, or remove the folder to start anew."
            )

    def _damaged(self, record: Record) -> str | None:
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, expected {FORMAT}")
        record["progress"], record["fingerprint"]
        for file in record["files"].values():
            path = self.folder / file["name"]
            if not path.is_file():
                return f"{path.name} is missing"
            if file_hash(path) != file["sha256"]:
                return f"{path.name} does not hold what was written to it"
        return None

    def _compare(self, record: Record) -> None:
        there, here = _flat(record["fingerprint"]), _flat(self.fingerprint)
        differing = [
            key for key in sorted({*there, *here}) if there.get(key) != here.get(key)
        ]
        if differing:
            raise StateError(
                f"The saved state in {self.folder} is of another run: "
                + "; ".join(
                    _difference(k, there.get(k), here.get(k)) for k in differing
                )
                + ". Run with what it was made with to go on, name another "
                "checkpoint_dir, or remove the folder to start anew."
            )

    def _clear(self) -> None:
        """Remove what neither of the newest two states needs."""
        needed = {f"state-{number:06d}.json" for number in self._records} | {
            file["name"]
            for record in self._records.values()
            for file in record["files"].values()
        }
        for pattern in ("*.safetensors", "state-*.json", "*.part"):
            for path in self.folder.glob(pattern):
                if path.name not in needed:
                    path.unlink(missing_ok=True)


@contextmanager
def open_checkpoint(
    folder: Path, fingerprint: Mapping[str, Any]
) -> Iterator[Checkpoint]:
    """
    The states of one stage, kept to this process.

    :raises FolderBusyError: while another process has the folder
    :raises FolderError: if the folder cannot be written to
    :raises StateError: as :class:`Checkpoint` does
    """
    with exclusive(folder, _REMEDY):
        yield Checkpoint(folder, fingerprint)


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        return {prefix: content}
    return {
        key: value
        for name, inner in content.items()
        for key, value in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def _difference(key: str, there: Any, here: Any) -> str:
    texts = [json.dumps(value) for value in (there, here)]
    if max(map(len, texts)) > SHOWN_CHARACTERS:
        return f"{key} differs"
    return f"{key} is {texts[0]} there and {texts[1]} here"
