"""A small OpenAI-compatible endpoint on 127.0.0.1 that answers as a test tells it, and remembers what it was asked."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


class JudgeServer:
    """`answer(number, body)` is called for request `number` (from 0) and returns (status, headers, body).

    Used as a context manager. requests: bodies in order; headers: theirs; most_at_once: calls under way together.
    """

    def __init__(self, answer: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._guard = threading.Lock()

    def __enter__(self) -> "JudgeServer":
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._guard:
                    number = len(outer.requests)
                    outer.requests.append(body | {"path": self.path})
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                try:
                    status, headers, content = outer.answer(number, body)
                finally:
                    with outer._guard:
                        outer._at_once -= 1
                try:
                    self.send_response(status)
                    for name, value in ({"Content-Type": "application/json"} | headers).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except BrokenPipeError:  # the client's time was up
                    pass

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def environ(self) -> dict[str, str]:
        return {"JUDGE_MODEL": "judge-1", "JUDGE_BASE_URL": self.url, "JUDGE_API_KEY": "secret-key"}


def completion(text: str | None, *, model: str = "judge-1-0101", delay_s: float = 0.0, **more: Any) -> Reply:
    """Return a well-formed chat completion with this text."""
    time.sleep(delay_s)
    message = {"role": "assistant", "content": text}
    reply = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }
    return 200, {}, json.dumps(reply | more).encode()


def failure(status: int, message: str = "no", *, code: str | None = None, **headers: str) -> Reply:
    """Return an error in OpenAI's form; `headers` in snake case."""
    error = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(error).encode()
