"""The saved state: atomic, guarded, and bounded on disk."""

import json
import multiprocessing
import os
import resource
import signal

import pytest
import torch

from llmc_faq_slider.files import FolderBusyError, FolderError
from llmc_faq_slider.slider.checkpoint import Checkpoint, StateError, open_checkpoint

pytestmark = pytest.mark.unit

FACTS = {"model": {"weights": "a" * 64}, "recipe": {"epochs": 4, "seed": 0}}


def tensors(value):
    return {"learned.000000": torch.full((4, 4), float(value))}


def in_a_process(work, *arguments):
    """Exit status of a forked process that does the work."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "slider-1"


def saved(folder, numbers):
    with open_checkpoint(folder, FACTS) as checkpoint:
        for number in numbers:
            role = f"layer-{number % 2}"
            checkpoint.save({"windows": number}, {role: tensors(number)})


def test_the_newest_state_comes_back(folder):
    saved(folder, range(5))
    with open_checkpoint(folder, FACTS) as checkpoint:
        assert checkpoint.progress == {"windows": 4}
        assert "layer-0" in checkpoint and "window" not in checkpoint
        for role, value in (("layer-0", 4), ("layer-1", 3)):
            found = checkpoint.tensors(role)["learned.000000"]
            assert torch.equal(found, tensors(value)["learned.000000"])


def test_two_states_and_what_they_need_are_kept(folder):
    saved(folder, range(9))
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        "layer-0-000006.safetensors",
        "layer-0-000008.safetensors",
        "layer-1-000007.safetensors",
        "state-000007.json",
        "state-000008.json",
    ]


def test_a_role_that_is_dropped_is_gone(folder):
    with open_checkpoint(folder, FACTS) as checkpoint:
        checkpoint.save({}, {"window": tensors(1)})
        checkpoint.save({}, {}, drop=("window",))
        assert "window" not in checkpoint


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model": {"weights": "a" * 64}, "recipe": {"epochs": 5, "seed": 0}},
            "recipe.epochs is 4 there and 5 here",
        ),
        (
            {"model": {"weights": "b" * 64}, "recipe": {"epochs": 4, "seed": 0}},
            "model.weights differs",
        ),
        (
            {"model": {"weights": "a" * 64}, "recipe": {"epochs": 4, "seed": 1}},
            "recipe.seed is 0 there and 1 here",
        ),
    ],
)
def test_another_run_is_refused_by_name(folder, changed, message):
    saved(folder, range(2))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(StateError, match=message):
        saved_with = open_checkpoint(folder, changed)
        saved_with.__enter__()
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert before == after


@pytest.mark.parametrize("name", ["layer-0-000004.safetensors", "state-000004.json"])
def test_a_torn_newest_file_costs_one_window(folder, name):
    saved(folder, range(5))
    path = folder / name
    path.write_bytes(path.read_bytes()[:-20])
    with open_checkpoint(folder, FACTS) as checkpoint:
        assert checkpoint.progress == {"windows": 3}
        found = checkpoint.tensors("layer-0")["learned.000000"]
        assert torch.equal(found, tensors(2)["learned.000000"])
        checkpoint.save({"windows": 4}, {"layer-0": tensors(4)})
    with open_checkpoint(folder, FACTS) as checkpoint:
        assert checkpoint.progress == {"windows": 4}


def test_a_torn_file_of_both_states_is_named_and_may_come_back(folder):
    saved(folder, range(2))
    with open_checkpoint(folder, FACTS) as checkpoint:
        checkpoint.save({"windows": 2}, {})
        checkpoint.save({"windows": 3}, {})
    path = folder / "layer-0-000000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StateError, match="layer-0-000000.safetensors does not hold"):
        Checkpoint(folder, FACTS)
    path.write_bytes(whole)
    assert Checkpoint(folder, FACTS).progress == {"windows": 3}


def test_a_state_of_another_format_is_refused(folder):
    saved(folder, range(1))
    path = folder / "state-000000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(StateError, match="format 99, expected 1"):
        Checkpoint(folder, FACTS)


def fill_the_disk(folder):
    """No file of this process may grow beyond 2 KiB: the kernel refuses the rest."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open_checkpoint(folder, FACTS) as checkpoint:
        try:
            checkpoint.save({"windows": 9}, {"layer-0": {"x": torch.zeros(4096)}})
        except FolderError as error:
            os._exit(17 if "What was saved before is intact" in str(error) else 18)
    os._exit(0)


def test_a_full_disk_leaves_the_last_state(folder):
    saved(folder, range(3))
    assert in_a_process(fill_the_disk, folder) == 17
    with open_checkpoint(folder, FACTS) as checkpoint:
        assert checkpoint.progress == {"windows": 2}
        checkpoint.save({"windows": 3}, {"layer-1": tensors(3)})
    assert not list(folder.glob("*.part"))


def write_as_nobody(folder):
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    try:
        with open_checkpoint(folder, FACTS):
            os._exit(0)
    except FolderError as error:
        os._exit(17 if "name another `checkpoint_dir`" in str(error) else 18)


def test_a_read_only_folder_is_refused(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert in_a_process(write_as_nobody, closed / "slider-1") == 17


def open_second(folder):
    try:
        with open_checkpoint(folder, FACTS):
            os._exit(0)
    except FolderBusyError as error:
        text = str(error)
        os._exit(17 if "Another process" in text and "checkpoint_dir" in text else 18)


def test_a_second_process_is_refused_and_the_lock_ends_with_its_owner(folder):
    with open_checkpoint(folder, FACTS):
        assert in_a_process(open_second, folder) == 17
    assert in_a_process(open_second, folder) == 0
