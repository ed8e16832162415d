"""A language model as the judge of answers, behind any OpenAI-compatible endpoint.

The endpoint comes from the environment alone:

    JUDGE_MODEL      the judge's name as the endpoint knows it; best a dated version (gpt-4-0613), never an alias
    JUDGE_BASE_URL   e.g. http://127.0.0.1:8000/v1; default OPENAI_BASE_URL, then OpenAI's own
    JUDGE_API_KEY    any text where the endpoint wants none; OPENAI_API_KEY serves only where JUDGE_BASE_URL is not
                     set, so that a key never goes to an endpoint that it was not meant for

Judgements are paid for, so each is appended to a jsonl file the moment it is there, and is never asked for again: its
key is the question, the turn, the hash of the answers shown, the judge, the hash of everything else that is sent, and
the number of the judgement. What is on file is scored without an endpoint, too.

Ratings are read as FastChat reads them: the first [[number]], else the first [number], else −1 (`NO_RATING`), which is
counted and never averaged. A number off the scale of 1 to 10 counts as no rating, too: FastChat would average it, but
from a weak judge it is a year or a footnote.
"""

import contextlib
import datetime
import email.utils
import fcntl
import hashlib
import json
import math
import os
import random
import re
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.errors import UserError
from ba_lora.io import disk_errors

if TYPE_CHECKING:
    import openai

OPENAI_URL = "https://api.openai.com/v1"
SCALE = (1.0, 10.0)
NO_RATING = -1.0
PROMPT_TOO_LONG = "prompt_too_long"  # finish_reason of a judgement whose prompt the judge's context does not hold
CHARACTERS_PER_TOKEN = 4  # English text, for the estimate
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # back-off doubles from the first to the longest
TOLD_WAIT_S = 5.0  # a wait from which on the user is told
LONGEST_RETRY_AFTER_S = 600.0  # an endpoint that asks for more is left alone
KEY = ("question_id", "turn", "answer_hash", "judge", "prompt_hash", "index")
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


@dataclass(frozen=True)
class JudgeOptions:
    """How to ask. judgements: of each answer; attempts: for one judgement, the first included.

    temperature and max_tokens as published (0 and 2048); None leaves the field out, for models that refuse it.
    """

    judgements: int = 3
    parallel: int = 4
    timeout_s: float = 120.0
    attempts: int = 8
    temperature: float | None = 0.0
    max_tokens: int | None = 2048


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is; the key shows up in no text made of this."""

    model: str
    base_url: str
    api_key: str = field(repr=False)

    @property
    def public_url(self) -> str:
        """The address without user, password and query, for records and messages."""
        parts = urllib.parse.urlsplit(self.base_url)
        host = parts.hostname or ""
        return urllib.parse.urlunsplit(
            (parts.scheme, f"{host}:{parts.port}" if parts.port else host, parts.path, "", "")
        )


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

    def key(self, judge: str, index: int, options: JudgeOptions) -> tuple:
        """Return the key under which the judgement is stored."""
        settings = f"{self.frame}\0{options.temperature}\0{options.max_tokens}"
        return (self.question_id, self.turn, digest(self.shown), judge, digest(settings), index)


@dataclass(frozen=True)
class Judged:
    """ratings[i]: those of request i, `NO_RATING` where none could be read; record: who judged, for the result."""

    ratings: list[list[float]]
    record: dict[str, Any]


def digest(text: str) -> str:
    """Return the first 16 hex digits of the text's sha256."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def read_rating(judgement: str) -> float:
    """Return the rating in a judge's text, or `NO_RATING`; see the head of this file."""
    found = next((match for pattern in _RATINGS if (match := pattern.search(judgement))), None)
    rating = float(found[1]) if found and len(found[1]) < 20 else NO_RATING
    return rating if SCALE[0] <= rating <= SCALE[1] else NO_RATING


def endpoint_from_environment(environ: Mapping[str, str] = os.environ) -> Endpoint:
    """Return the endpoint that the environment names. Raises UserError naming the variable to set."""
    model = environ.get("JUDGE_MODEL", "").strip()
    if not model:
        raise UserError("JUDGE_MODEL is not set: name the judge, e.g. JUDGE_MODEL=gpt-4-0613")
    own_url = environ.get("JUDGE_BASE_URL", "").strip()
    key = environ.get("JUDGE_API_KEY", "").strip()
    if not own_url:
        key = key or environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError(
            "JUDGE_API_KEY is not set: set the key of the judge's endpoint"
            + (" (any text where it needs none)" if own_url else ", or OPENAI_API_KEY for OpenAI's")
        )
    url = own_url or environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_URL
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        name = "JUDGE_BASE_URL" if own_url else "OPENAI_BASE_URL"
        raise UserError(f"{name} is no http address: give one such as http://127.0.0.1:8000/v1")
    return Endpoint(model, url.rstrip("/"), key)


def judge(
    requests: Sequence[Request],
    *,
    store: Path,
    options: JudgeOptions = JudgeOptions(),
    progress: Callable[[int], object] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Judged:
    """Return `options.judgements` ratings of each request, asking only for those that `store` does not hold.

    Prints calls and tokens to be expected before the first call. Raises UserError where the endpoint is missing or
    fails, another process writes to `store`, or judgements of two judges would be mixed; what was paid is on file then.
    """
    with _Store(store) as stored:
        name = environ.get("JUDGE_MODEL", "").strip() or stored.only_judge(requests, options)
        wanted = {
            request.key(name, index, options): request for request in requests for index in range(options.judgements)
        }
        missing = {key: request for key, request in wanted.items() if key not in stored.rows}
        versions = _versions(stored.rows[key] for key in wanted if key in stored.rows)
        if len(versions) > 1:
            raise UserError(
                f"{store} mixes judges: {name} answered as {' and '.join(versions)}; "
                "remove the judgements of one of them"
            )
        if missing:
            print(estimate(list(missing.values()), name, options, num_wanted=len(wanted)), file=sys.stderr, flush=True)
            endpoint = endpoint_from_environment(environ)
            _ask_all(missing, endpoint, stored, options, next(iter(versions), None), progress)
        rows = {key: stored.rows[key] for key in wanted}
    ratings = [
        [rows[request.key(name, index, options)]["rating"] for index in range(options.judgements)]
        for request in requests
    ]
    return Judged(ratings, _record(name, rows.values(), options))


def estimate(requests: Sequence[Request], name: str, options: JudgeOptions, *, num_wanted: int) -> str:
    """Return the line that says what asking will cost: calls, and tokens by a rule of thumb."""
    tokens = sum(len(request.system) + len(request.user) for request in requests) // CHARACTERS_PER_TOKEN
    most = "no bound" if options.max_tokens is None else f"at most {len(requests) * options.max_tokens:,}"
    return (
        f"judge {name}: {len(requests)} calls ({num_wanted - len(requests)} of {num_wanted} judgements are on file), "
        f"about {tokens:,} tokens of prompts ({CHARACTERS_PER_TOKEN} characters a token), {most} of judgements"
    )


def one_judge(scores: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the id of the judge behind these scores (None without any). Raises UserError where there are several.

    For whoever puts scores side by side: model, version, prompts and settings must be the same.
    """
    ids = {score["judge"]["id"] for score in scores}
    if len(ids) > 1:
        raise UserError(f"these scores are by different judges, which are never compared: {'; '.join(sorted(ids))}")
    return next(iter(ids), None)


def _versions(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the model strings that the endpoint gave with these judgements, sorted."""
    return sorted({row["judge_version"] for row in rows if row["finish_reason"] != PROMPT_TOO_LONG})


def _record(name: str, rows: Iterable[Mapping[str, Any]], options: JudgeOptions) -> dict[str, Any]:
    rows = list(rows)
    return {
        "model": name,
        "version": next(iter(_versions(rows)), None),
        "fingerprints": sorted({row["fingerprint"] for row in rows if row["fingerprint"]}),
        "endpoints": sorted({row["endpoint"] for row in rows}),
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "judgements_per_answer": options.judgements,
        "num_judgements": len(rows),
        "num_invalid_judgements": sum(row["rating"] == NO_RATING for row in rows),
        "num_prompt_too_long": sum(row["finish_reason"] == PROMPT_TOO_LONG for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] or 0 for row in rows),
        "completion_tokens": sum(row["completion_tokens"] or 0 for row in rows),
        "first": min(row["time"] for row in rows),
        "last": max(row["time"] for row in rows),
    }


class _Store:
    """The judgements on file, by key; open for one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple, dict[str, Any]] = {}
        self._writing = threading.Lock()

    def __enter__(self) -> "_Store":
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115 (closed in __exit__)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process is judging into {self.path}: wait for it to end") from error
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self.path.stat().st_size == 0:
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
                self.rows[tuple(row[name] for name in KEY)] = row
                for name in _ROW_KEYS:
                    row[name]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path}, line {number}: no judgement; remove the line or the file") from error

    def add(self, row: dict[str, Any]) -> None:
        """Append a judgement, and let it reach the disk."""
        line = json.dumps(row, ensure_ascii=True) + "\n"
        with self._writing, disk_errors(self.path):
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


_ROW_KEYS = (
    "judge_version", "fingerprint", "endpoint", "rating", "finish_reason", "prompt_tokens", "completion_tokens", "time",
)  # fmt: skip


class _Cancelled(Exception):
    """Another call has failed for good: this one ends without an answer."""


def _ask_all(
    missing: Mapping[tuple, Request],
    endpoint: Endpoint,
    stored: _Store,
    options: JudgeOptions,
    version: str | None,
    progress: Callable[[int], object] | None,
) -> None:
    """Ask for every missing judgement, `options.parallel` at a time, and store each at once.

    version: what the endpoint must answer as, None where no judgement is on file yet.
    """
    stop, guard = threading.Event(), threading.Lock()

    def check_version(answered: str) -> None:
        nonlocal version
        with guard:
            version = version or answered
        if answered != version:
            raise UserError(
                f"{endpoint.model} answers as {answered} now, but judged as {version} before, and two judges are not "
                "mixed: name a dated version in JUDGE_MODEL, or move the judgements away"
            )

    def one(client: "openai.OpenAI", key: tuple, request: Request) -> None:
        answer = _ask(client, endpoint, request, options, stop)
        if answer["finish_reason"] != PROMPT_TOO_LONG:
            check_version(answer["judge_version"])
        moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        stored.add(dict(zip(KEY, key, strict=True)) | answer | {"endpoint": endpoint.public_url, "time": moment})
        if progress:
            progress(1)

    items = list(missing.items())
    with _client(endpoint, options) as client, ThreadPoolExecutor(max_workers=options.parallel) as pool:
        try:
            # the first alone: a wrong key or name costs one call, and the judge's version is known for the others
            for batch in (items[:1], items[1:]):
                for future in as_completed([pool.submit(one, client, key, request) for key, request in batch]):
                    future.result()
        except BaseException as error:
            stop.set()
            pool.shutdown(cancel_futures=True)  # calls under way end, and are stored
            if not isinstance(error, UserError):
                raise
            num_left = sum(key not in stored.rows for key in missing)
            raise UserError(
                f"{error} ({len(missing) - num_left} new judgements are on file, {num_left} are missing: "
                "the next run asks for those alone)"
            ) from error


@contextlib.contextmanager
def _client(endpoint: Endpoint, options: JudgeOptions) -> "Iterator[openai.OpenAI]":
    import openai

    client = openai.OpenAI(
        api_key=endpoint.api_key, base_url=endpoint.base_url, timeout=options.timeout_s, max_retries=0
    )
    client.organization = client.project = None  # the environment's belong to OpenAI, not to every endpoint
    with client:
        yield client


def _ask(
    client: "openai.OpenAI", endpoint: Endpoint, request: Request, options: JudgeOptions, stop: threading.Event
) -> dict[str, Any]:
    """Return one judgement's part of its row. Raises UserError when the endpoint refuses, or keeps failing."""
    import openai

    settings = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    for attempt in range(1, options.attempts + 1):
        if stop.is_set():
            raise UserError("stopped")
        started = time.monotonic()
        try:
            reply = client.chat.completions.create(
                model=endpoint.model,
                messages=[{"role": "system", "content": request.system}, {"role": "user", "content": request.user}],
                **{name: value for name, value in settings.items() if value is not None},
            )
            return _read_reply(reply) | {"seconds": round(time.monotonic() - started, 3)}
        except (openai.APIError, ValueError) as error:
            if _is_too_long(error):
                return _row("", None, finish_reason=PROMPT_TOO_LONG) | {"seconds": 0.0}
            reason = _reason(error, endpoint)
            wait = _wait(error, attempt)
            if wait is None:
                raise UserError(f"the judge at {endpoint.public_url} {reason}") from error
            if attempt == options.attempts:
                raise UserError(
                    f"the judge at {endpoint.public_url} failed {attempt} times, at last: {reason}; "
                    "check it, or lower judge_parallel"
                ) from error
        if wait >= TOLD_WAIT_S:
            print(f"judge: {reason}; next attempt in {wait:.0f} s", file=sys.stderr, flush=True)
        stop.wait(wait)
    raise AssertionError("attempts is at least 1")


def _read_reply(reply: Any) -> dict[str, Any]:
    """Return the row's part that the reply tells. Raises ValueError for a reply that is no chat completion."""
    try:
        choice, version, usage = reply.choices[0], reply.model, reply.usage
        text = choice.message.content or ""  # a refusal or nothing but hidden reasoning: no rating
        if not isinstance(text, str) or not isinstance(version, str) or not version:
            raise TypeError("text and model must be strings")
    except (AttributeError, IndexError, TypeError, KeyError) as error:
        raise ValueError(f"the reply is no chat completion ({error})") from error
    return _row(
        text,
        version,
        finish_reason=choice.finish_reason,
        fingerprint=getattr(reply, "system_fingerprint", None),
        prompt_tokens=getattr(usage, "prompt_tokens", None),
        completion_tokens=getattr(usage, "completion_tokens", None),
    )


def _row(
    text: str,
    version: str | None,
    *,
    finish_reason: str | None,
    fingerprint: str | None = None,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
) -> dict[str, Any]:
    return {
        "judge_version": version,
        "fingerprint": fingerprint,
        "rating": read_rating(text),
        "judgement": text,
        "finish_reason": finish_reason,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
    }


def _is_too_long(error: Exception) -> bool:
    """Whether the endpoint says that the prompt does not fit into the judge's context."""
    if getattr(error, "status_code", None) not in (400, 413, 422):
        return False
    text = f"{getattr(error, 'code', '')} {error}".lower()
    return "context_length" in text or "context length" in text or "maximum model length" in text


def _wait(error: Exception, attempt: int) -> float | None:
    """Return the seconds to wait before the next attempt, None where another makes no sense."""
    import openai

    status = getattr(error, "status_code", None)
    if isinstance(error, openai.APIStatusError):
        if status not in (408, 409, 425, 429) and status < 500 or error.code == "insufficient_quota":
            return None
        asked = _retry_after(error.response.headers)
        if asked is not None:
            return asked if asked <= LONGEST_RETRY_AFTER_S else None
    wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1))
    return wait * random.uniform(0.5, 1.0)  # parallel calls must not come back all at once


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the Retry-After header asks for (a number, or a date), None without a readable one."""
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _reason(error: Exception, endpoint: Endpoint) -> str:
    """Return what went wrong in a few words, without the key."""
    import openai

    status = getattr(error, "status_code", None)
    said = " ".join(str(error).replace(endpoint.api_key, "***").split())[:300]
    if isinstance(error, openai.APITimeoutError):
        return "did not answer in time (judge_timeout_s)"
    if isinstance(error, openai.APIConnectionError):
        cause = str(error.__cause__ or error).replace(endpoint.api_key, "***")
        return f"cannot be reached ({' '.join(cause.split())[:200]}): check JUDGE_BASE_URL"
    if status in (401, 403):
        return f"refused the key ({status}): check JUDGE_API_KEY"
    if status == 404:
        return f"does not know {endpoint.model} (404: {said}): check JUDGE_MODEL and JUDGE_BASE_URL"
    if status is not None and status < 500 and status != 429:
        return (
            f"refused the request ({status}: {said}); judge_temperature=none and judge_max_tokens=none leave out "
            "what some models do not take"
        )
    if status is not None:
        return f"answered {status} ({said})"
    return f"sent a broken reply ({said})"
