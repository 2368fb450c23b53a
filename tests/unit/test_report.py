"""Perplexity against closed forms, and the server's life with a stand-in for vLLM."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmc_faq_slider.report.perplexity import perplexity
from llmc_faq_slider.report.server import ServerError, serve

pytestmark = pytest.mark.unit

TEXT = "The state of the union is strong, and the people are at work. " * 20


@pytest.fixture
def model(small_model):
    return AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)


def test_perplexity_of_uniform_model_is_vocabulary_size(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    value = perplexity(model, tokenizer, TEXT, sequence_length=16)
    assert value == pytest.approx(model.config.vocab_size, rel=1e-4)


def test_perplexity_is_exp_of_the_models_own_loss(model, tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    rows = ids[0, :96].view(3, 32)
    with torch.inference_mode():
        loss = model(input_ids=rows, labels=rows).loss
    for batch_size in (1, 2, 8):
        value = perplexity(model, tokenizer, TEXT, 32, 100, batch_size)
        assert value == pytest.approx(loss.exp().item(), rel=1e-4)


def test_perplexity_leaves_the_mode_as_it_was(model, tokenizer):
    model.train()
    perplexity(model, tokenizer, TEXT, 16, 16)
    assert model.training


def test_perplexity_refuses_a_text_without_a_full_row(model, tokenizer):
    with pytest.raises(ValueError, match="fewer than one row of 512"):
        perplexity(model, tokenizer, "Too short.")


def stand_in(folder: Path, body: str) -> Path:
    """Writes an environment whose `vllm` is the given Python code."""
    (folder / "config.json").write_text("{}")
    (folder / "bin").mkdir()
    command = folder / "bin" / "vllm"
    command.write_text(f"#!/usr/bin/env python3\n{body}")
    command.chmod(0o755)
    return folder


def test_server_that_ends_shows_the_end_of_its_log(tmp_path):
    environment = stand_in(tmp_path, "raise SystemExit('no such kernel')")
    with pytest.raises(ServerError, match="no such kernel"):
        with serve(tmp_path, environment, tmp_path / "log"):
            pass


def test_server_that_never_gets_ready_is_given_up(tmp_path):
    environment = stand_in(tmp_path, "import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(ServerError, match="not ready after 1 s"):
        with serve(tmp_path, environment, tmp_path / "log", timeout=1):
            pass
    assert time.monotonic() - start < 20


def test_server_and_the_processes_it_started_are_ended(tmp_path):
    environment = stand_in(
        tmp_path,
        f"""
import http.server, pathlib, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
worker = subprocess.Popen(["sleep", "300"])
pathlib.Path({str(tmp_path / "worker")!r}).write_text(str(worker.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
""",
    )
    with serve(tmp_path, environment, tmp_path / "log") as server:
        worker = int((tmp_path / "worker").read_text())
        os.kill(worker, 0)
        assert server.url.startswith("http://127.0.0.1:")
    for _ in range(50):
        try:
            # An ended worker may stay listed until its new parent collects it.
            if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
                return
            os.kill(worker, 0)
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived the server")
