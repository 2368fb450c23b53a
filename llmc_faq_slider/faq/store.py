"""Files of the stage: candidates and scores as they arrive, finished data sets.

Below the root, the logs in ``candidates/<key>/`` only ever grow, and
``datasets/<key>/`` holds ``calibration.safetensors`` (``input_ids`` int32 [N, L],
``loss_mask`` uint8 [N, L]), ``messages.jsonl`` (the samples it was packed from) and
``manifest.json``. A key is the hash of all that decides the content, so a changed
setting never meets a stale file.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from safetensors.torch import load_file, save_file

from llmc_faq_slider.files import (
    FolderBusyError,
    exclusive,
    file_hash,
    settle,
    write_json,
    writing,
)

_KEY_DIGITS = 16
DATA = "calibration.safetensors"
MESSAGES = "messages.jsonl"
MANIFEST = "manifest.json"

StoreBusyError = FolderBusyError


@dataclass(frozen=True)
class Candidate:
    """One stored answer.

    :param prompt_id: which prompt
    :param index: candidate number of that prompt
    :param ids: answer ids, with the end id if one was drawn; empty if it failed
    :param finished: an end id was drawn before the token limit
    :param score: mean log-probability under the generator, nats per token; None if
        the generator did not tell
    :param exact: the ids are those that were drawn, not text tokenised again
    :param failure: why there is no usable answer, None if there is
    :param prompt_tokens: tokens of the prompt
    """

    prompt_id: str
    index: int
    ids: list[int]
    finished: bool
    score: float | None
    exact: bool = True
    failure: str | None = None
    prompt_tokens: int = 0


@dataclass(frozen=True)
class CalibrationSet:
    """The regenerated data.

    :param input_ids: int32 [N, L]
    :param loss_mask: uint8 [N, L], 1 on answer tokens
    :param manifest: what produced it
    :param reused: read from disk, nothing was generated
    :param folder: where it is kept
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    manifest: dict[str, Any]
    reused: bool
    folder: Path


def content_key(content: Mapping[str, Any]) -> str:
    """Key of JSON-like content."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


class CandidateLog:
    """Append-only log of candidates; a torn last line is cut off when opened."""

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[tuple[str, int], Candidate] = {}
        for number, record in _read_lines(path):
            try:
                candidate = Candidate(**record)
            except TypeError as error:
                raise _spoilt(path, number, error) from error
            self._known[candidate.prompt_id, candidate.index] = candidate

    def get(self, prompt_id: str, index: int) -> Candidate | None:
        return self._known.get((prompt_id, index))

    def append(self, candidate: Candidate) -> None:
        """Write a candidate, unless it is known, and wait until it is on disk."""
        key = candidate.prompt_id, candidate.index
        if key not in self._known:
            _append_line(self._path, asdict(candidate))
            self._known[key] = candidate

    def note(self, candidate: Candidate) -> None:
        """Keep a candidate for this run only."""
        self._known.setdefault((candidate.prompt_id, candidate.index), candidate)


class ScoreLog:
    """Append-only log of scores by name, kept like candidates."""

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, list[float]] = {}
        for number, record in _read_lines(path):
            try:
                self._known[record["of"]] = record["scores"]
            except (KeyError, TypeError) as error:
                raise _spoilt(path, number, error) from error

    def get(self, of: str) -> list[float] | None:
        return self._known.get(of)

    def append(self, of: str, scores: list[float]) -> None:
        """Write scores and wait until they are on disk. An empty list is a failure."""
        _append_line(self._path, {"of": of, "scores": scores})
        self._known[of] = scores


class Store:
    """The files below one root folder."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()

    def locked(self, key: str) -> AbstractContextManager[None]:
        """Keep the candidates of a key to this process, which may end in any way.

        :raises StoreBusyError: while another process has them
        :raises WriteError: if the folder cannot be written to
        """
        advice = "give this run a `cache_dir` of its own"
        return exclusive(self._candidate_folder(key), advice)

    def candidates(self, key: str, settings: Mapping[str, Any]) -> CandidateLog:
        """The log of one key; ``settings`` are written beside it for readers."""
        folder = self._candidate_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        log = CandidateLog(folder / "candidates.jsonl")
        with writing(folder):
            write_json(folder / "settings.json", settings)
        return log

    def scores(self, key: str, expert_key: str) -> ScoreLog:
        """What one expert said of the candidates of a key."""
        return ScoreLog(self._candidate_folder(key) / f"scores-{expert_key}.jsonl")

    def dataset_folder(self, key: str) -> Path:
        return self.root / "datasets" / key

    def read_dataset(self, key: str) -> CalibrationSet | None:
        """The finished set of a key, or None if absent or damaged."""
        folder = self.dataset_folder(key)
        if not all((folder / name).is_file() for name in (MANIFEST, MESSAGES, DATA)):
            return None
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except ValueError:
            manifest = {}
        found = {name: file_hash(folder / name) for name in (DATA, MESSAGES)}
        if manifest.get("sha256") != found:
            logger.warning(
                f"FAQ: {folder} does not match its manifest and is built anew"
            )
            return None
        tensors = load_file(folder / DATA)
        return CalibrationSet(
            tensors["input_ids"], tensors["loss_mask"], manifest, True, folder
        )

    def write_dataset(
        self,
        key: str,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        messages: Iterable[Mapping[str, Any]],
        manifest: Mapping[str, Any],
    ) -> CalibrationSet:
        """Write data, then manifest, each in one step.

        :param messages: a record per sample
        """
        folder = self.dataset_folder(key)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            parts = {name: folder / (name + ".part") for name in (DATA, MESSAGES)}
            save_file({"input_ids": input_ids, "loss_mask": loss_mask}, parts[DATA])
            lines = [json.dumps(m, ensure_ascii=False) + "\n" for m in messages]
            parts[MESSAGES].write_text("".join(lines), encoding="utf-8")
            hashes = {name: file_hash(part) for name, part in parts.items()}
            full = {**manifest, "key": key, "sha256": hashes}
            for name, part in parts.items():
                settle(part, folder / name)
            write_json(folder / MANIFEST, full)
        return CalibrationSet(input_ids, loss_mask, full, False, folder)

    def _candidate_folder(self, key: str) -> Path:
        return self.root / "candidates" / key


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered records of a log; an incomplete last line is cut off the file."""
    if not path.is_file():
        return
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        logger.warning(f"FAQ: cut off an incomplete last line of {path}")
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise _spoilt(path, number, error) from error


def _append_line(path: Path, record: Mapping[str, Any]) -> None:
    with writing(path), path.open("ab") as file:
        # one write, so that a kill leaves at most one incomplete line, at the end
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _spoilt(path: Path, number: int, error: Exception) -> ValueError:
    return ValueError(
        f"line {number} of {path} cannot be read ({error}); remove the file to have "
        "its content made again"
    )
