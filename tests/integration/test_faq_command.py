"""The command, what it writes, and what a kill leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from scripted_server import scripted_server
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llmc_faq_slider import oneshot
from llmc_faq_slider.cli import app
from llmc_faq_slider.faq.rendering import end_of_turn_id

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
ROWS, LENGTH = 6, 64
FIELDS = {
    "max_new_tokens": 16,
    "batch_size": 4,
    "min_response_tokens": 1,
    "max_repeated_share": 1.0,
    "max_similarity": 1.0,
    "max_fallback_fraction": 1.0,
}


@pytest.fixture
def arguments(small_model, large_model, tmp_path):
    def make(name="run", generator=large_model, output="out", **fields) -> list[str]:
        settings = FIELDS | {"cache_dir": str(tmp_path / name)} | fields
        return [
            *("regenerate", str(small_model), "--output", str(tmp_path / output)),
            *("--generator", str(generator), "--num-candidates", "2"),
            *("--num-samples", str(ROWS), "--sequence-length", str(LENGTH)),
            *(part for k, v in settings.items() for part in ("--set", f"{k}={v}")),
        ]

    return make


def run(arguments):
    return CliRunner().invoke(app, arguments)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("datasets/*/*")}


def log_of(folder: Path) -> Path | None:
    return next(folder.glob("candidates/*/candidates.jsonl"), None)


def kill_after(arguments, folder: Path, lines: int) -> None:
    """Start the command, and kill it without warning once it has stored that much."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llmc_faq_slider.cli", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 240
        while time.monotonic() < until and process.poll() is None:
            log = log_of(folder)
            if log is not None and log.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.005)
        else:
            pytest.fail(f"the run ended or stored nothing: {process.poll()}")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_gives_the_same_bytes_when_it_is_run_again(
    arguments, tmp_path
) -> None:
    assert run(arguments("whole")).exit_code == 0
    kill_after(arguments("cut"), tmp_path / "cut", lines=7)
    stored = log_of(tmp_path / "cut").read_bytes()
    assert not files(tmp_path / "cut")
    assert run(arguments("cut")).exit_code == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    kept = stored[: stored.rfind(b"\n") + 1]
    assert log_of(tmp_path / "cut").read_bytes().startswith(kept)


def test_a_killed_run_asks_a_server_only_for_what_is_not_stored(
    arguments, tokenizer, tmp_path
) -> None:
    with scripted_server(tokenizer, end_of_turn_id(tokenizer)) as server:
        fields = {"generator": server.url, "generator_model": "served"}
        assert run(arguments("whole", max_new_tokens=40, **fields)).exit_code == 0
        requests = sorted(body["seed"] for body in server.generations)
        server.requests.clear()
        server.wait = 0.05
        cut = arguments("cut", max_new_tokens=40, concurrency=2, **fields)
        kill_after(cut, tmp_path / "cut", lines=5)
        before = [body["seed"] for body in server.generations]
        stored = log_of(tmp_path / "cut").read_bytes().count(b"\n")
        server.requests.clear()
        assert run(cut).exit_code == 0
        after = [body["seed"] for body in server.generations]
        assert len(after) == len(set(after)) == len(requests) - stored
        # only what was under way, or on its way to the disk, is asked for again
        assert len(set(before) & set(after)) <= 4
        assert sorted(set(before) | set(after)) == requests
        assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_two_processes_on_one_store_are_refused(arguments, tokenizer, tmp_path) -> None:
    with scripted_server(tokenizer, end_of_turn_id(tokenizer)) as server:
        server.wait = 1.0
        fields = {"generator": server.url, "max_new_tokens": 40, "concurrency": 1}
        first = subprocess.Popen(
            [sys.executable, "-m", "llmc_faq_slider.cli", *arguments(**fields)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until = time.monotonic() + 240
            while time.monotonic() < until and not server.generations:
                time.sleep(0.05)
            second = run(arguments(**fields))
            assert second.exit_code == 1
            assert "Another process is writing to" in second.output
            # the same folder serves another set of candidates meanwhile
            server.wait = 0.0
            other = arguments(**fields, temperature=0.5, output="other")
            assert run(other).exit_code == 0
        finally:
            first.kill()
            first.wait()


def test_what_is_written_can_be_read_by_other_tools(
    arguments, tokenizer, small_model, tmp_path
) -> None:
    shown = run(arguments())
    assert shown.exit_code == 0 and f"{ROWS} rows of {LENGTH} tokens" in shown.output
    out = tmp_path / "out"
    data = load_file(out / "calibration.safetensors")
    # other rows in a folder of the same name are read as well, not those again
    assert run(arguments(output="other/out", temperature=0.5)).exit_code == 0
    other = load_dataset(str(tmp_path / "other" / "out"), split="train")
    rows = load_dataset(str(out), split="train")
    assert rows["input_ids"] == data["input_ids"].tolist() != other["input_ids"]
    assert rows["loss_mask"] == data["loss_mask"].tolist()
    assert data["input_ids"].shape == (ROWS, LENGTH)
    records = [
        json.loads(line) for line in (out / "messages.jsonl").read_text().splitlines()
    ]
    for record in records:
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
        rendered = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        # a template closes every turn; one that was cut off is left open
        assert rendered.startswith(record["text"])
    texts = [tokenizer(record["text"])["input_ids"] for record in records]
    assert sum(len(ids) for ids in texts) >= ROWS * LENGTH
    again = run(arguments())
    assert again.exit_code == 0


def test_oneshot_takes_the_folder(
    arguments, small_model, tmp_path, monkeypatch
) -> None:
    assert run(arguments()).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype="auto")
    seen: list[list[int]] = []

    def watch(module, inputs) -> None:
        if type(inputs[0]) is torch.Tensor and not inputs[0].is_meta:
            seen.extend(row for row in inputs[0].tolist() if row not in seen)

    hook = model.get_input_embeddings().register_forward_pre_hook(watch)
    gptq = GPTQModifier(targets="Linear", ignore=["lm_head"], scheme="W4A16")
    oneshot(model=model, recipe=[gptq], dataset=str(tmp_path / "out"))
    hook.remove()
    data = load_file(tmp_path / "out" / "calibration.safetensors")
    assert sorted(seen) == sorted(data["input_ids"].tolist())


def test_a_dry_run_writes_nothing_and_tells_the_cost(arguments, tmp_path) -> None:
    shown = run([*arguments(), "--dry-run"])
    assert shown.exit_code == 0
    for line in ("requests", "tokens written", "time", "cut off"):
        assert line in shown.output
    assert not (tmp_path / "out").exists() and not log_of(tmp_path / "run")


def test_the_estimate_is_near_the_truth(arguments, tmp_path) -> None:
    planned = run([*arguments(), "--dry-run"]).output
    line = next(row for row in planned.splitlines() if "requests" in row)
    estimated = int("".join(c for c in line if c.isdigit()))
    assert run(arguments()).exit_code == 0
    (path,) = (tmp_path / "run").glob("datasets/*/manifest.json")
    # whole batches of 4 prompts, 2 answers each, are asked for
    asked = json.loads(path.read_text())["counts"]["candidates"]
    assert abs(estimated - asked) <= 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--set", "nothing=1"], "sets no field"),
        (["--set", "top_p=7"], "top_p: Input should be less than"),
        (["--selector", "best"], "selector"),
        (["--seeds", "gone.jsonl"], "no file at"),
        (["--generator", "/no/such/folder"], "cannot be read"),
        (
            ["--generator", "http://example.org/v1", "--seeds", "own.txt"],
            "allow_remote",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    arguments, tmp_path, monkeypatch, changes, message
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text("a text of my own")
    shown = run([*arguments(), *changes])
    assert shown.exit_code == 2 and message in shown.output
    assert "Traceback" not in shown.output


def test_a_folder_with_other_files_is_left_alone(arguments, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    shown = run(arguments())
    assert shown.exit_code == 1 and "holds other files" in shown.output
    assert os.listdir(tmp_path / "out") == ["precious.txt"]
