"""Files of the stage: candidates and scores as they arrive, finished data sets.

Below the root, the logs in ``candidates/<key>/`` only ever grow, and
``datasets/<key>/`` holds ``calibration.safetensors`` (``input_ids`` int32 [N, L],
``loss_mask`` uint8 [N, L]), ``messages.jsonl`` (the samples it was packed from) and
``manifest.json``. A key is the hash of all that decides the content, so a changed
setting never meets a stale file. Records carry checksums, so a changed byte is noticed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from pydantic import ConfigDict, with_config
from safetensors.torch import load, save

from llmc_faq_slider.faq.records import (
    REMEDY,
    BrokenSeal,
    append_record,
    read_records,
    seal,
    unseal,
)
from llmc_faq_slider.files import exclusive, settle, write_json, writing

_KEY_DIGITS = 16
DATA = "calibration.safetensors"
MESSAGES = "messages.jsonl"
MANIFEST = "manifest.json"


@with_config(ConfigDict(extra="forbid"))
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


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class _Scores:
    of: str
    scores: list[float]


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
        for candidate in read_records(path, Candidate):
            self._known[candidate.prompt_id, candidate.index] = candidate

    def get(self, prompt_id: str, index: int) -> Candidate | None:
        return self._known.get((prompt_id, index))

    def append(self, candidate: Candidate) -> None:
        """Write a candidate, unless it is known, and wait until it is on disk."""
        key = candidate.prompt_id, candidate.index
        if key not in self._known:
            append_record(self._path, asdict(candidate))
            self._known[key] = candidate

    def note(self, candidate: Candidate) -> None:
        """Keep a candidate for this run only."""
        self._known.setdefault((candidate.prompt_id, candidate.index), candidate)


class ScoreLog:
    """Append-only log of scores by name, kept like candidates."""

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, list[float]] = {}
        for record in read_records(path, _Scores):
            self._known[record.of] = record.scores

    def get(self, of: str) -> list[float] | None:
        return self._known.get(of)

    def append(self, of: str, scores: list[float]) -> None:
        """Write scores and wait until they are on disk. An empty list is a failure."""
        append_record(self._path, asdict(_Scores(of, scores)))
        self._known[of] = scores


class Store:
    """The files below one root folder."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()

    def locked(self, key: str) -> AbstractContextManager[None]:
        """Keep the candidates of a key to this process, which may end in any way.

        :raises FolderBusyError: while another process has them
        :raises FolderError: if the folder cannot be written to
        """
        return exclusive(self._candidate_folder(key), REMEDY)

    def candidates(self, key: str, settings: Mapping[str, Any]) -> CandidateLog:
        """The log of one key; ``settings`` are written beside it for readers."""
        folder = self._candidate_folder(key)
        with writing(folder, REMEDY):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "settings.json", settings)
        return CandidateLog(folder / "candidates.jsonl")

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
            return read_calibration(folder)
        except BrokenSeal as error:
            logger.warning(f"FAQ: {error}; the data set is built anew")
            return None

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
        lines = [json.dumps(m, ensure_ascii=False) + "\n" for m in messages]
        files = {
            DATA: save({"input_ids": input_ids, "loss_mask": loss_mask}),
            MESSAGES: "".join(lines).encode(),
        }
        hashes = {name: hashlib.sha256(b).hexdigest() for name, b in files.items()}
        full = seal({**manifest, "key": key, "sha256": hashes})
        with writing(folder, REMEDY):
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                part = folder / (name + ".part")
                part.write_bytes(content)
                settle(part, folder / name)
            write_json(folder / MANIFEST, full)
        return CalibrationSet(input_ids, loss_mask, full, False, folder)

    def _candidate_folder(self, key: str) -> Path:
        return self.root / "candidates" / key


def read_calibration(folder: Path) -> CalibrationSet:
    """A finished data set, if every byte of it is as it was written.

    :raises BrokenSeal: naming what is not
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        unseal(manifest)
    except ValueError as error:
        raise BrokenSeal(f"{folder / MANIFEST} is damaged: {error}") from error
    content = {name: (folder / name).read_bytes() for name in (DATA, MESSAGES)}
    for name, data in content.items():
        if hashlib.sha256(data).hexdigest() != manifest["sha256"][name]:
            raise BrokenSeal(f"{folder / name} does not match the manifest beside it")
    tensors = load(content[DATA])
    return CalibrationSet(
        tensors["input_ids"], tensors["loss_mask"], manifest, True, folder
    )
