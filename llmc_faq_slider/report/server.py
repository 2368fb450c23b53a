"""``vllm serve`` from an environment of its own, started and stopped around a block.

vLLM is never imported here: only its command is run and only HTTP is spoken, because it
cannot share an environment with llm-compressor.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

# Name under which the checkpoint is served, whatever its folder is called.
MODEL_NAME = "model"


class ServerError(RuntimeError):
    """The server did not start, or ended before it was asked to."""


@dataclass(frozen=True)
class Server:
    """
    A running server: where it is and the few questions we ask.

    :param process_group: of the server and all processes that it started
    """

    url: str
    log: Path
    process_group: int

    def _post(self, path: str, body: dict[str, object]) -> dict:
        answer = httpx.post(
            f"{self.url}{path}", json={"model": MODEL_NAME, **body}, timeout=300
        )
        if answer.is_error:
            raise ServerError(f"{path}: {answer.status_code} {answer.text[:500]}")
        return answer.json()

    def chat(self, question: str, max_tokens: int = 64) -> str:
        """Returns the greedy answer to one user message."""
        body = self._post(
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": question}],
                "max_tokens": max_tokens,
                "temperature": 0,
            },
        )
        return body["choices"][0]["message"]["content"]

    def complete(self, prompt: str | Sequence[int], max_tokens: int = 64) -> str:
        """Returns the greedy continuation of a text, or of token ids."""
        body = self._post(
            "/v1/completions",
            {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0},
        )
        return body["choices"][0]["text"]

    def stream(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 64,
        ignore_eos: bool = False,
    ) -> Iterator[str]:
        """Yields the greedy continuation piece by piece, as it is made."""
        body: dict[str, object] = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": ignore_eos,
        }
        for choice in self._stream("/v1/completions", body):
            yield choice["text"]

    def stream_chat(self, question: str, max_tokens: int = 64) -> Iterator[str]:
        """Yields the greedy answer to one user message piece by piece."""
        body: dict[str, object] = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        for choice in self._stream("/v1/chat/completions", body):
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]

    def _stream(self, path: str, body: dict[str, object]) -> Iterator[dict]:
        """Yields the first choice of every server-sent event."""
        request = {"model": MODEL_NAME, "stream": True, **body}
        with httpx.stream(
            "POST", f"{self.url}{path}", json=request, timeout=600
        ) as answer:
            if answer.is_error:
                answer.read()
                raise ServerError(f"{path}: {answer.status_code} {answer.text[:500]}")
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                choices = json.loads(data)["choices"]
                if choices:
                    yield choices[0]

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Returns the log-probability of every token of the prompt but the first."""
        body = self._post(
            "/v1/completions",
            {
                "prompt": list(token_ids),
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 0,
            },
        )
        per_position = body["choices"][0]["prompt_logprobs"][1:]
        return [
            position[str(token)]["logprob"]
            for token, position in zip(token_ids[1:], per_position, strict=True)
        ]


@contextmanager
def serve(
    checkpoint: Path,
    environment: Path,
    log: Path,
    *,
    dtype: str = "bfloat16",
    max_model_len: int = 1024,
    max_num_seqs: int = 8,
    eager: bool = True,
    timeout: float = 900,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Server]:
    """Serves ``checkpoint`` on the loopback interface while the block runs.

    The context is cut to ``max_model_len`` tokens to keep the key-value cache small.
    ``environment`` is the virtual environment that holds vLLM. ``eager`` leaves out
    compiling, which takes longer than a few requests. ``on_wait`` is called about once
    a second with the seconds waited so far.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    length = min(max_model_len, config.get("max_position_embeddings", max_model_len))
    port = _free_port()
    command = [
        str(environment.absolute() / "bin" / "vllm"),
        "serve",
        str(checkpoint),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", MODEL_NAME),
        *("--dtype", dtype, "--max-model-len", str(length)),
        *("--max-num-seqs", str(max_num_seqs)),
        *(["--enforce-eager"] if eager else []),
    ]
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group of its own, so that the workers vLLM starts are ended with it.
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", log, process.pid)
        _wait_until_healthy(server, process, timeout, on_wait)
        yield server
    finally:
        _end_group(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(
    server: Server,
    process: subprocess.Popen[bytes],
    timeout: float,
    on_wait: Callable[[float], None],
) -> None:
    start = time.monotonic()
    while True:
        waited = time.monotonic() - start
        if process.poll() is not None:
            problem = f"vLLM ended with code {process.returncode} while starting"
        elif waited > timeout:
            problem = f"vLLM was not ready after {timeout:.0f} s"
        else:
            try:
                if httpx.get(f"{server.url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                pass
            on_wait(waited)
            time.sleep(1)
            continue
        raise ServerError(f"{problem}; from {server.log}:\n{_excerpt(server.log)}")


def _excerpt(log: Path) -> str:
    """Returns the errors in a log and its end: the cause is often far above the end."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [
        line for line in lines[:-20] if re.search(r"\w+(Error|Exception): ", line)
    ]
    return "\n".join([*errors[-5:], *lines[-20:]])


def _end_group(process: subprocess.Popen[bytes], patience: float = 15) -> None:
    """Ends the server and everything it started, first kindly, then not."""
    for sign, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, patience)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
