"""The judgements on file: each is appended the moment it is there, and found again by what was asked of whom."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.errors import UserError
from ba_lora.io import disk_errors
from ba_lora.locks import locked
from eval.judge.client import JudgeOptions

KEY = ("question_id", "turn", "answer_hash", "judge", "prompt_hash", "index")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("question_id", "turn", "index"), (int,)),
    **dict.fromkeys(("answer_hash", "judge", "prompt_hash", "endpoint", "judgement", "time"), (str,)),
    **dict.fromkeys(("judge_version", "fingerprint", "finish_reason"), (str, type(None))),
    **dict.fromkeys(("prompt_tokens", "completion_tokens"), (int, type(None))),
}


@dataclass(frozen=True)
class Request:
    """What the judge is asked about one answer.

    shown: the model's text that is judged, and nothing else; system, user: the messages, which hold it.
    frame: what identifies the messages without the answer (prompts, questions, reference), for the hash.
    """

    question_id: int
    turn: int
    shown: str
    system: str
    user: str
    frame: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages, in OpenAI's form."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.user}]

    def key(self, judge: str, index: int, options: JudgeOptions) -> tuple:
        """Return the key under which the judgement is stored."""
        settings = f"{self.frame}\0{options.temperature}\0{options.max_tokens}"
        return (self.question_id, self.turn, short_sha256(self.shown), judge, short_sha256(settings), index)


def short_sha256(text: str) -> str:
    """Return the first 16 hex digits of the text's sha256."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def check_row(row: object) -> None:
    """Raise ValueError unless `row` is a judgement: every key of its type."""
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, found {type(row).__name__}")
    for name, types in _TYPES.items():
        if name not in row:
            raise ValueError(f"{name} is missing")
        if not isinstance(row[name], types) or isinstance(row[name], bool):
            raise ValueError(f"{name} is {row[name]!r:.40}")
        if int in types and row[name] is not None and row[name] < 0:
            raise ValueError(f"{name} is {row[name]}")


class Store:
    """The judgements on file, by key; open for one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple, dict[str, Any]] = {}

    def __enter__(self) -> "Store":
        lock_path = self.path.with_name(f".{self.path.name}.lock")
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(lock_path, doing=f"is judging into {self.path}", made=self.path))
            stack.callback(self._remove_if_empty)
            with disk_errors(self.path):
                self._file = stack.enter_context(open(self.path, "a+b"))
            self._read()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def _remove_if_empty(self) -> None:
        if self.path.is_file() and self.path.stat().st_size == 0:
            self.path.unlink()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # a kill in the middle of the last line
            self._file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                check_row(row)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{self.path}, line {number}: no judgement ({str(error)[:100]}); remove the line or the file"
                ) from error
            self.rows[tuple(row[name] for name in KEY)] = row

    def add(self, row: dict[str, Any]) -> None:
        """Append a judgement, and let it reach the disk."""
        check_row(row)  # what is written must be read again
        line = json.dumps(row, ensure_ascii=True) + "\n"
        with disk_errors(self.path):
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self.rows[tuple(row[name] for name in KEY)] = row

    def only_judge(self, requests: Sequence[Request], options: JudgeOptions) -> str:
        """Return the one judge on file that has judged all requests. Raises UserError: none has, or several have."""
        complete = [
            name
            for name in sorted({key[KEY.index("judge")] for key in self.rows})
            if all(
                request.key(name, index, options) in self.rows
                for request in requests
                for index in range(options.judgements)
            )
        ]
        if len(complete) > 1:
            raise UserError(f"{self.path} holds judgements of {' and '.join(complete)}: choose with JUDGE_MODEL")
        if not complete:
            number = len(requests) * options.judgements
            raise UserError(
                f"not all of the {number} judgements are in {self.path}: name the judge with JUDGE_MODEL, "
                "JUDGE_BASE_URL and JUDGE_API_KEY"
            )
        return complete[0]
