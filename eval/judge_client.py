"""The judge's endpoint: one call with retries and back-off, and the rating in its reply.

Troubles that pass (a busy or broken endpoint, a broken reply, no answer in time) are tried again, after a wait that
doubles or that the endpoint asks for; the others end the judging with one line. The key shows up in no message.
"""

import contextlib
import email.utils
import math
import random
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ba_lora.errors import UserError
from ba_lora.judge_endpoint import Endpoint
from eval.completions import PROMPT_TOO_LONG

if TYPE_CHECKING:
    import openai

SCALE = (1.0, 10.0)
NO_RATING = -1.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # back-off doubles from the first to the longest
TOLD_WAIT_S = 5.0  # a wait from which on the user is told
LONGEST_RETRY_AFTER_S = 600.0  # an endpoint that asks for more is left alone
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


def read_rating(judgement: str) -> float:
    """Return the rating in a judge's text, or `NO_RATING`; see the head of this file."""
    found = next((match for pattern in _RATINGS if (match := pattern.search(judgement))), None)
    rating = float(found[1]) if found and len(found[1]) < 20 else NO_RATING
    return rating if SCALE[0] <= rating <= SCALE[1] else NO_RATING


@contextlib.contextmanager
def open_client(endpoint: Endpoint, options: JudgeOptions) -> "Iterator[openai.OpenAI]":
    import openai

    client = openai.OpenAI(
        api_key=endpoint.api_key, base_url=endpoint.base_url, timeout=options.timeout_s, max_retries=0
    )
    client.organization = client.project = None  # the environment's belong to OpenAI, not to every endpoint
    with client:
        yield client


def ask(
    client: "openai.OpenAI",
    endpoint: Endpoint,
    messages: Sequence[Mapping[str, str]],
    *,
    options: JudgeOptions,
    stop: threading.Event,
) -> dict[str, Any]:
    """Return what a judgement's row tells of the reply. Raises UserError when the endpoint refuses, or keeps failing,
    and once `stop` is set."""
    import openai

    settings = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    for attempt in range(1, options.attempts + 1):
        if stop.is_set():
            raise UserError("stopped")
        started = time.monotonic()
        try:
            reply = client.chat.completions.create(
                model=endpoint.model,
                messages=messages,
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
