"""The judge's endpoint: one call, with openai's own retries and back-off, and the rating in its reply.

Troubles that pass (a busy or broken endpoint, a broken reply, no answer in time) are tried again, after a wait that
doubles or that the endpoint asks for; the others end the judging with one line. The key shows up in no message.
The endpoint is not trusted: a whole reply has `timeout_s` and `MAX_REPLY_BYTES`, compressed ones are refused, no
redirect is followed, and what the reply says of itself is stored only if it has the right type.
"""

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ba_lora.errors import UserError
from ba_lora.judge_endpoint import Endpoint
from eval.completions import PROMPT_TOO_LONG
from eval.grading.thinking import THINKING, cut_thinking

if TYPE_CHECKING:
    import openai

SCALE = (1.0, 10.0)
NO_RATING = -1.0
MAX_REPLY_BYTES = 10_000_000  # a long judgement is a hundredth of it
_MAX_DIGITS = 20
# FastChat's two patterns (possessive: their time is linear), and between them the first as Markdown escapes it
_RATINGS = (
    re.compile(r"\[\[(\d++\.?+\d*+)\]\]"),
    re.compile(r"\\\[\\\[(\d++\.?+\d*+)\\\]\\\]"),
    re.compile(r"\[(\d++\.?+\d*+)\]"),
)


@dataclass(frozen=True)
class JudgeOptions:
    """How to ask. judgements: of each answer; attempts: for one judgement, the first included; timeout_s: for a whole
    reply; thinking: the marks around what the judge writes before its judgement (eval/grading/thinking.py).

    temperature and max_tokens as published (0 and 2048); None leaves the field out, for models that refuse it.
    """

    judgements: int = 3
    parallel: int = 4
    timeout_s: float = 120.0
    attempts: int = 8
    temperature: float | None = 0.0
    max_tokens: int | None = 2048
    thinking: str = THINKING


def read_rating(judgement: str, thinking: str = THINKING) -> float:
    """Return the rating in a judge's text, or `NO_RATING`; see the head of eval/judge/judge.py."""
    return next(iter(read_ratings(judgement, thinking)), NO_RATING)


def read_ratings(judgement: str, thinking: str = THINKING) -> list[float]:
    """Return the different ratings in a judge's text, the one that counts first, `NO_RATING` for one off the scale."""
    text = cut_thinking(judgement, thinking)
    found = next((numbers for pattern in _RATINGS if (numbers := pattern.findall(text))), [])
    ratings = [float(number) if len(number) < _MAX_DIGITS else NO_RATING for number in found]
    return list(dict.fromkeys(rating if SCALE[0] <= rating <= SCALE[1] else NO_RATING for rating in ratings))


def open_client(endpoint: Endpoint, options: JudgeOptions) -> "openai.AsyncOpenAI":
    """Return the client for `ask`. Its `exchanging` holds the tasks that have sent a request and await the reply."""
    import httpx2
    import openai

    class Client(openai.DefaultAsyncHttpxClient):
        """Reads whole replies, within the limits that the head of this file names."""

        async def send(self, request: httpx2.Request, **settings: Any) -> httpx2.Response:
            settings |= {"stream": True, "follow_redirects": False}
            exchanging.add(asyncio.current_task())
            try:
                async with asyncio.timeout(options.timeout_s):
                    response = await super().send(request, **settings)
                    try:
                        content = await _read_limited(response)
                    finally:
                        await response.aclose()
                if response.is_success:
                    _check_reply(content)
            except TimeoutError as error:
                raise httpx2.ReadTimeout("no whole reply in time", request=request) from error
            except ValueError as error:
                raise httpx2.DecodingError(str(error), request=request) from error  # openai tries again
            finally:
                exchanging.discard(asyncio.current_task())
            if b"insufficient_quota" in content:
                response.headers["x-should-retry"] = "false"
            return httpx2.Response(response.status_code, headers=response.headers, content=content, request=request)

    exchanging: set[asyncio.Task | None] = set()
    client = openai.AsyncOpenAI(
        api_key=endpoint.api_key,
        base_url=endpoint.base_url,
        max_retries=options.attempts - 1,
        default_headers={"Accept-Encoding": "identity"},
        http_client=Client(timeout=options.timeout_s),
    )
    client.organization = client.project = None  # the environment's belong to OpenAI, not to every endpoint
    client.exchanging = exchanging
    return client


async def ask_judge(
    client: "openai.AsyncOpenAI",
    endpoint: Endpoint,
    messages: Sequence[Mapping[str, str]],
    *,
    options: JudgeOptions,
) -> dict[str, Any]:
    """Return what a judgement's row tells of the reply. Raises UserError when the endpoint refuses or keeps failing."""
    import openai

    settings = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    started = time.monotonic()
    try:
        reply = await client.chat.completions.create(
            model=endpoint.model,
            messages=messages,
            **{name: value for name, value in settings.items() if value is not None},
        )
    except openai.APIError as error:
        if _is_too_long(error):
            return _row("", None, finish_reason=PROMPT_TOO_LONG) | {"seconds": 0.0}
        attempts = int(error.request.headers.get("x-stainless-retry-count", 0)) + 1
        failed = f"failed {attempts} times, at last: " if attempts > 1 else ""
        advice = "; check it, or lower judge_parallel" if attempts > 1 else ""
        raise UserError(f"the judge at {endpoint.public_url} {failed}{_reason(error, endpoint)}{advice}") from error
    choice, usage = reply.choices[0], reply.usage
    return _row(
        choice.message.content or "",  # a refusal or nothing but hidden reasoning: no rating
        reply.model,
        finish_reason=None if choice.finish_reason == PROMPT_TOO_LONG else choice.finish_reason,  # ours only
        fingerprint=_of_type(getattr(reply, "system_fingerprint", None), str),
        prompt_tokens=_of_type(getattr(usage, "prompt_tokens", None), int),
        completion_tokens=_of_type(getattr(usage, "completion_tokens", None), int),
    ) | {"seconds": round(time.monotonic() - started, 3)}


async def _read_limited(response: Any) -> bytes:
    """Return the body. Raises ValueError for a compressed or a too long one."""
    coding = response.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise ValueError(f"compressed ({coding[:20]}), which was not asked for")
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > MAX_REPLY_BYTES:
            raise ValueError(f"longer than {MAX_REPLY_BYTES // 10**6} MB")
    return bytes(content)


def _check_reply(content: bytes) -> None:
    """Raise ValueError unless a reply is a chat completion, as far as it is read here."""
    try:
        reply = json.loads(content)
        choice, version = reply["choices"][0], reply["model"]
        texts = (choice["message"].get("content"), choice.get("finish_reason"))
        if not all(text is None or isinstance(text, str) for text in texts):
            raise TypeError("content and finish_reason must be texts")
        if not isinstance(version, str) or not version:
            raise TypeError("model must be a text")
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"the reply is no chat completion ({type(error).__name__}: {str(error)[:100]})") from error


def _of_type(value: object, kind: type) -> Any:
    """Return a value that is for information only, None where it has another type or is no count."""
    wrong = not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0)
    return None if wrong else value


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


def _reason(error: Exception, endpoint: Endpoint) -> str:
    """Return what went wrong in a few words, without the key."""
    import httpx2
    import openai

    def said_by(error: BaseException, length: int = 300) -> str:
        return " ".join(str(error).replace(endpoint.api_key, "***").split())[:length] or type(error).__name__

    status = getattr(error, "status_code", None)
    said = said_by(error)
    if isinstance(error, openai.APITimeoutError):
        return "did not answer in time (judge_timeout_s)"
    if isinstance(error.__cause__, httpx2.DecodingError):
        return f"sent a broken reply ({said_by(error.__cause__)})"
    if isinstance(error, openai.APIConnectionError):
        return f"cannot be reached ({said_by(error.__cause__ or error, 200)}): check JUDGE_BASE_URL"
    if status is not None and 300 <= status < 400:
        target = said_by(Exception(error.response.headers.get("location", "nowhere")), 100)
        return f"sends on to {target} ({status}), which is not followed: set JUDGE_BASE_URL to the address itself"
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
