"""A local OpenAI-compatible server that answers as a test tells it to."""

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
#: what to do with a request: (status, headers, content), or None to drop the connection
Reaction = tuple[int, dict[str, str], bytes] | None


def reply(body: Body) -> Reaction:
    return 200, {}, json.dumps(body).encode()


def failure(status: int, said: str = "no", **headers: str) -> Reaction:
    return status, headers, json.dumps({"error": {"message": said}}).encode()


def written(body: Body, end_id: int, size: int = 30) -> tuple[list[int], list[float]]:
    """The ids and log-probabilities this server draws for a seed."""
    draw = random.Random(body["seed"])
    ids = [draw.randrange(300, 2000) for _ in range(size)]
    return [*ids, end_id], [-draw.random() for _ in range(size + 1)]


class ScriptedServer:
    """Serves one model. ``react`` may be exchanged; ``requests`` holds all POSTs."""

    def __init__(self, tokenizer: Any, end_id: int):
        self.tokenizer, self.end_id = tokenizer, end_id
        self.requests: list[tuple[str, dict[str, str], Body]] = []
        self.react: Callable[[str, Body], Reaction] = self.usual
        self.active = self.most_active = 0
        self.wait = 0.0
        self.url = ""
        self._lock = threading.Lock()

    @property
    def generations(self) -> list[Body]:
        """Bodies of the requests that carry a seed; probes carry none."""
        return [body for _, _, body in self.requests if "seed" in body]

    def usual(self, path: str, body: Body) -> Reaction:
        """What a well-behaved server with token ids replies."""
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return reply({"tokens": ids, "count": len(ids)})
        if path != "/v1/completions":
            return failure(404)
        if "prompt_logprobs" in body:
            told = [{str(i): {"logprob": -0.5}} for i in body["prompt"]]
            return reply(self._choice("x", [5], prompt_logprobs=[None, *told[1:]]))
        if "seed" not in body:
            return reply(self._choice("hm", [5, 6], [-0.5, -0.5]))
        ids, logprobs = written(body, self.end_id)
        return reply(self._choice(self.tokenizer.decode(ids[:-1]), ids, logprobs))

    def _choice(
        self,
        text: str,
        ids: list[int],
        logprobs: list[float] | None = None,
        **more: Any,
    ) -> Body:
        choice = {
            "text": text,
            "finish_reason": "stop",
            "token_ids": ids,
            "logprobs": {"token_logprobs": logprobs} if logprobs else None,
        }
        return {"choices": [choice | more], "usage": None}

    def take(self, path: str, headers: dict[str, str], body: Body) -> Reaction:
        with self._lock:
            self.requests.append((path, headers, body))
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            time.sleep(self.wait)
            return self.react(path, body)
        finally:
            with self._lock:
                self.active -= 1


@contextmanager
def scripted_server(tokenizer: Any, end_id: int) -> Iterator[ScriptedServer]:
    script = ScriptedServer(tokenizer, end_id)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            entry = {"id": "served", "root": "somewhere", "max_model_len": 1000}
            self.send(reply({"object": "list", "data": [entry]}))

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            headers = {k.lower(): v for k, v in self.headers.items()}
            self.send(script.take(self.path, headers, json.loads(raw)))

        def send(self, reaction: Reaction) -> None:
            if reaction is None:
                # a reset, not an orderly end
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                return
            status, headers, content = reaction
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
