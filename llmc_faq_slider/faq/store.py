"""Files of the stage: candidates as they arrive, and the finished data sets.

Below the root, ``candidates/<key>/candidates.jsonl`` only ever grows, and
``datasets/<key>/`` holds ``calibration.safetensors`` (``input_ids`` int32 [N, L],
``loss_mask`` uint8 [N, L]) and ``manifest.json``. A key is the hash of all that
decides the content, so a changed setting never meets a stale file.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors.torch import load_file, save_file

_KEY_DIGITS = 16
_DATA = "calibration.safetensors"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Candidate:
    """One stored answer.

    :param prompt_id: which prompt
    :param index: candidate number of that prompt
    :param ids: answer ids, with the end id if one was drawn
    :param finished: an end id was drawn before the token limit
    :param score: mean log-probability under the generator, nats per token
    """

    prompt_id: str
    index: int
    ids: list[int]
    finished: bool
    score: float


@dataclass(frozen=True)
class CalibrationSet:
    """The regenerated data.

    :param input_ids: int32 [N, L]
    :param loss_mask: uint8 [N, L], 1 on answer tokens
    :param manifest: what produced it
    :param reused: read from disk, nothing was generated
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    manifest: dict[str, Any]
    reused: bool


def content_key(content: Mapping[str, Any]) -> str:
    """Key of JSON-like content."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


class CandidateLog:
    """Append-only log of candidates; a torn last line is cut off when opened."""

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known = {(c.prompt_id, c.index): c for c in _read_log(path)}

    def get(self, prompt_id: str, index: int) -> Candidate | None:
        return self._known.get((prompt_id, index))

    def append(self, candidates: Iterable[Candidate]) -> None:
        """Write candidates not seen before and wait until they are on disk."""
        fresh = [c for c in candidates if (c.prompt_id, c.index) not in self._known]
        with self._path.open("a", encoding="utf-8") as file:
            for candidate in fresh:
                file.write(json.dumps(asdict(candidate)) + "\n")
                self._known[candidate.prompt_id, candidate.index] = candidate
            file.flush()
            os.fsync(file.fileno())


class Store:
    """The files below one root folder."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the root; released when a process dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def candidates(self, key: str, settings: Mapping[str, Any]) -> CandidateLog:
        """The log of one key; ``settings`` are written beside it for readers."""
        folder = self.root / "candidates" / key
        log = CandidateLog(folder / "candidates.jsonl")
        _write_json(folder / "settings.json", settings)
        return log

    def dataset_folder(self, key: str) -> Path:
        return self.root / "datasets" / key

    def read_dataset(self, key: str) -> CalibrationSet | None:
        """The finished set of a key, or None if absent or damaged."""
        folder = self.dataset_folder(key)
        if not (folder / _MANIFEST).is_file() or not (folder / _DATA).is_file():
            return None
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        except ValueError:
            manifest = {}
        if manifest.get("sha256") != _file_hash(folder / _DATA):
            logger.warning(
                f"FAQ: {folder} does not match its manifest and is built anew"
            )
            return None
        tensors = load_file(folder / _DATA)
        return CalibrationSet(
            tensors["input_ids"], tensors["loss_mask"], manifest, reused=True
        )

    def write_dataset(
        self,
        key: str,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        manifest: Mapping[str, Any],
    ) -> CalibrationSet:
        """Write data, then manifest, each in one step."""
        folder = self.dataset_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / (_DATA + ".part")
        save_file({"input_ids": input_ids, "loss_mask": loss_mask}, part)
        full = {**manifest, "key": key, "sha256": _file_hash(part)}
        os.replace(part, folder / _DATA)
        _write_json(folder / _MANIFEST, full)
        return CalibrationSet(input_ids, loss_mask, full, reused=False)


def _read_log(path: Path) -> list[Candidate]:
    if not path.is_file():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        logger.warning(f"FAQ: cut off an incomplete last line of {path}")
        os.truncate(path, len(whole))
    candidates = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            candidates.append(Candidate(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"line {number} of {path} is no candidate ({error}); remove the file "
                "to generate its candidates again"
            ) from error
    return candidates


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
