"""Full disks, files in the way and second writers: a sentence, and nothing lost."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmc_faq_slider import files
from llmc_faq_slider.faq.export import export
from llmc_faq_slider.faq.store import Candidate, CandidateLog, ScoreLog, Store
from llmc_faq_slider.files import (
    FolderBusyError,
    FolderError,
    check_room,
    exclusive,
    room_error,
    writing,
)
from llmc_faq_slider.host.oneshot import oneshot

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
REMEDY = "write elsewhere."
FULL = Path("/dev/full")
full_device = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


def candidate(index: int, size: int = 3) -> Candidate:
    return Candidate("a", index, [7] * size, True, -1.0)


@full_device
def test_a_log_on_a_full_disk(tmp_path) -> None:
    (tmp_path / "candidates.jsonl").symlink_to(FULL)
    (tmp_path / "scores.jsonl").symlink_to(FULL)
    log = CandidateLog(tmp_path / "candidates.jsonl")
    with pytest.raises(FolderError, match="no room left to write.*`cache_dir`"):
        log.append(candidate(0))
    assert log.get("a", 0) is None
    with pytest.raises(FolderError, match="no room left"):
        ScoreLog(tmp_path / "scores.jsonl").append("x", [1.0])


class _Limit:
    """Files of this process can grow to a size and no further, as on a full disk."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_half_a_line_is_taken_back(tmp_path) -> None:
    """What was written before stays, and the run goes on once there is room."""
    path = tmp_path / "candidates.jsonl"
    log = CandidateLog(path)
    log.append(candidate(0))
    before = path.read_bytes()
    with _Limit(len(before) + 100), pytest.raises(FolderError, match="no room left"):
        log.append(candidate(1, 5000))
    assert path.read_bytes() == before
    log.append(candidate(1, 5000))
    assert CandidateLog(path).get("a", 1) == candidate(1, 5000)


def test_a_data_set_on_a_full_disk(tmp_path) -> None:
    ids = torch.ones(64, 64, dtype=torch.int32)
    arguments = ("key", ids, ids.to(torch.uint8), [], {"counts": {"selected": 1}})
    store = Store(tmp_path)
    with _Limit(4096), pytest.raises(FolderError, match="no room left"):
        store.write_dataset(*arguments)
    assert store.read_dataset("key") is None
    made = store.write_dataset(*arguments)
    assert store.read_dataset("key") is not None
    with _Limit(4096), pytest.raises(FolderError, match="another folder"):
        export(made, tmp_path / "out")


def test_what_is_no_folder(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    with pytest.raises(FolderError, match="cannot be written to: Not a directory"):
        store.candidates("key", {})
    with pytest.raises(FolderError, match="Not a directory"), store.locked("key"):
        pass


def test_other_errors_pass(tmp_path) -> None:
    for error in (OSError("no network"), ValueError("x"), BlockingIOError(11, "busy")):
        with pytest.raises(type(error)) as caught, writing(tmp_path, REMEDY):
            raise error
        assert caught.value is error


def test_a_checkpoint_on_a_full_disk(tmp_path) -> None:
    """safetensors says in words what the system said."""
    with _Limit(4096), pytest.raises((OSError, SafetensorError)) as caught:
        save_file({"x": torch.zeros(100_000)}, tmp_path / "model.safetensors")
    told = room_error(caught.value, tmp_path)
    assert told is not None and "no room left" in str(told)
    assert "quantised in memory" in str(told)
    words = SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")
    assert room_error(words, tmp_path) is not None
    assert room_error(SafetensorError("bad header"), tmp_path) is None
    assert room_error(FileNotFoundError(2, "gone"), tmp_path) is None


def test_too_small_a_disk_is_told_before_the_run(
    small_model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000)
    )
    recipe = str(ROOT / "recipes" / "faq_slider_w4a8.yaml")
    with pytest.raises(FolderError, match="has 100 kB of free space and at l"):
        oneshot(model=str(small_model), recipe=recipe, output_dir=str(tmp_path / "out"))
    check_room(tmp_path, 100_000, REMEDY)


def test_sizes_are_told_in_round_numbers() -> None:
    assert [files._size(n) for n in (0, 999, 1000, 2.5e9, 7e15)] == [
        *("0 bytes", "999 bytes", "1 kB", "2.5 GB", "7e+03 TB")
    ]


HOLD = """
import sys, time
from pathlib import Path
from llmc_faq_slider.files import exclusive
with exclusive(Path(sys.argv[1]), "wait."):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_in_one_folder(small_model, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        recipe = str(ROOT / "recipes" / "faq_slider_w4a8.yaml")
        with pytest.raises(FolderBusyError, match="Another process is writing to"):
            oneshot(model=str(small_model), recipe=recipe, output_dir=str(out))
    finally:
        other.kill()
        other.wait()
    with exclusive(out, REMEDY):
        pass
    assert list(out.iterdir()) == []
