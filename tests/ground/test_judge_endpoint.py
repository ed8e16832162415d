"""The judge's endpoint is not trusted: time and size of a whole reply, redirects, odd types, an edited store, http."""

import contextlib
import dataclasses
import gzip
import json
import resource
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from ba_lora.errors import UserError
from ba_lora.io import read_jsonl
from ba_lora.judge_endpoint import Endpoint
from eval.judge.client import JudgeOptions
from eval.judge.judge import judge
from tests.eval.judge.test_judge import ONE, quick, requests  # noqa: F401 (quick: a fixture)
from tests.support.judge_server import JudgeServer, completion


class RawServer:
    """Answers each connection with the parts that `parts` gives, as they are, each after its delay in seconds."""

    def __init__(self, parts: Iterable[tuple[float, bytes]]) -> None:
        self._parts = parts
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.connections = 0

    def __enter__(self) -> "RawServer":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    @property
    def environ(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        return {"JUDGE_MODEL": "judge-1", "JUDGE_BASE_URL": url, "JUDGE_API_KEY": "secret-key"}

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.recv(100_000)
            for delay_s, part in self._parts:
                time.sleep(delay_s)
                connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(100_000):  # else a reset would overtake the reply
                pass


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999999999\r\n"
DRIPS = {
    "headers": [(0.0, b"HTTP/1.1 200 OK\r\nX: "), *[(0.2, b"x")] * 300],
    "body": [(0.0, HEAD + b"\r\n"), *[(0.2, b" ")] * 300],
}


@pytest.mark.parametrize("drips", DRIPS.values(), ids=DRIPS)
def test_the_time_limit_holds_for_the_whole_reply(tmp_path: Path, drips: list) -> None:
    """One byte every 0.2 s, for a minute: no single read is ever late."""
    options = JudgeOptions(judgements=1, timeout_s=1.0, attempts=2)
    with RawServer(drips) as server:
        with pytest.raises(UserError, match=r"failed 2 times, at last: did not answer in time \(judge_timeout_s\)"):
            judge(requests(1), store=tmp_path / "j", options=options, environ=server.environ)
        assert server.connections == 2


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(0.0, HEAD + b"\r\n"), *[(0.0, b" " * 1_000_000)] * 900], "longer than 10 MB"),
        ([(0.0, HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b" " * 10**8))], "compressed"),
        ([(0.0, HEAD.replace(b"200 OK", b"500 E") + b"\r\n"), *[(0.0, b" " * 1_000_000)] * 900], "longer than 10 MB"),
        ([(0.0, b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"[" * 200_000)], "no chat completion"),
        ([(0.0, b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b'{"model": ' + b"9" * 9999)], "no chat completion"),
    ],
)
def test_the_size_of_a_reply_is_limited(tmp_path: Path, parts: list, said: str) -> None:
    options = JudgeOptions(judgements=1, timeout_s=20, attempts=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with RawServer(parts) as server, pytest.raises(UserError, match=said):
        judge(requests(1), store=tmp_path / "j", options=options, environ=server.environ)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_is_followed(tmp_path: Path, status: int) -> None:
    with JudgeServer(lambda number, body: completion("[[5]]")) as other:
        redirect = (status, {"Location": other.url + "/chat/completions"}, b"")
        with JudgeServer(lambda number, body: redirect) as server:
            with pytest.raises(UserError, match=rf"sends on to http://127\S+ \({status}\), which is not followed"):
                judge(requests(1), store=tmp_path / "j", options=ONE, environ=server.environ)
    assert other.requests == [] and len(server.requests) == 1


def test_odd_types_in_a_reply_are_not_stored(tmp_path: Path) -> None:
    usage = {"prompt_tokens": [1], "completion_tokens": -3, "total_tokens": True}
    with JudgeServer(lambda number, body: completion("[[5]]", usage=usage, system_fingerprint={"a": 1})) as server:
        judged = judge(requests(1), store=tmp_path / "j", options=ONE, environ=server.environ)
        assert judge(requests(1), store=tmp_path / "j", options=ONE, environ={}) == judged
    (row,) = read_jsonl(tmp_path / "j")
    assert judged.ratings == [[5]] and row["prompt_tokens"] is row["completion_tokens"] is row["fingerprint"] is None


@pytest.mark.parametrize(
    "more",
    [
        {"model": 3},
        {"model": ""},
        {"choices": [{"message": {"content": ["[[5]]"]}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": "[[5]]"}, "finish_reason": 7}]},
        {"choices": [{"message": None, "finish_reason": "stop"}]},
        {"choices": {}},
    ],
)
def test_a_reply_of_odd_types_is_a_broken_one(tmp_path: Path, more: dict) -> None:
    with JudgeServer(lambda number, body: completion("[[5]]", **({"model": "m"} | more))) as server:
        with pytest.raises(UserError, match="failed 4 times, at last: sent a broken reply .*no chat completion"):
            judge(requests(1), store=tmp_path / "j", options=ONE, environ=server.environ)
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_tokens": [1]}, r"prompt_tokens is \[1\]"),
        ({"judge": None}, "judge is None"),
        ({"judgement": 5}, "judgement is 5"),
        ({"question_id": "81"}, "question_id is '81'"),
        ({"question_id": {}}, "question_id is {}"),
        ({"index": -1}, "index is -1"),
    ],
)
def test_an_edited_store_is_one_line(tmp_path: Path, change: dict, said: str) -> None:
    store = tmp_path / "j.jsonl"
    with JudgeServer(lambda number, body: completion("[[6]]")) as server:
        judge(requests(1), store=store, options=ONE, environ=server.environ)
    (row,) = read_jsonl(store)
    store.write_text(json.dumps(row | change) + "\n")
    with pytest.raises(UserError, match=f"line 1: no judgement .*{said}.*; remove the line or the file"):
        judge(requests(1), store=store, options=ONE, environ={})


def test_a_far_host_without_encryption_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for url, host in {
        "http://judge.example:8000/v1": "judge.example", "http://10.0.0.7/v1": "10.0.0.7", "https://a.b/v1": None,
        "http://localhost:1/v1": None, "http://127.0.0.5/v1": None, "http://[::1]:8000/v1": None,
    }.items():  # fmt: skip
        assert Endpoint("m", url, "key").unencrypted_host == host, url
    environ = {"JUDGE_MODEL": "m", "JUDGE_BASE_URL": "http://nowhere.invalid/v1", "JUDGE_API_KEY": "secret-key"}
    with pytest.raises(UserError, match="cannot be reached"):
        judge(requests(1), store=tmp_path / "j", options=dataclasses.replace(ONE, attempts=1), environ=environ)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "nowhere.invalid is not encrypted" in warned[0] and "secret-key" not in warned[0]
