"""A language model as the judge of answers, behind any OpenAI-compatible endpoint.

The endpoint comes from the environment only:

    JUDGE_MODEL      the judge's name as the endpoint knows it; best a dated version (gpt-4-0613), never an alias
    JUDGE_BASE_URL   e.g. http://127.0.0.1:8000/v1; default OPENAI_BASE_URL, then OpenAI's own
    JUDGE_API_KEY    any text where the endpoint wants none; OPENAI_API_KEY serves only where JUDGE_BASE_URL is not
                     set, so that a key never goes to an endpoint that it was not meant for

Judgements are paid for, so each is appended to a jsonl file the moment it is there, and is never asked for again: its
key is the question, the turn, the hash of the answers shown, the judge, the hash of everything else that is sent, and
the number of the judgement. What is on file is scored without an endpoint, too.

Ratings are read as FastChat reads them: the first [[number]], else the first [number], else −1 (`NO_RATING`), which is
counted and never averaged. Ours: the judge's thinking is cut off before; \\[\\[8\\]\\] is read before a lone [8]; one
off the scale of 1 to 10 counts as no rating (FastChat would average it, but from a weak judge it is a year or a
footnote); a reply with several different ratings is counted and listed in the result. The rating is read from the
judgement's text on file each time.
"""

import asyncio
import datetime
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.errors import UserError
from ba_lora.judge_endpoint import Endpoint, endpoint_from_environment
from eval.completions import PROMPT_TOO_LONG
from eval.judge.client import NO_RATING, JudgeOptions, ask_judge, open_client, read_rating, read_ratings
from eval.judge.store import KEY, Request, Store

CHARACTERS_PER_TOKEN = 4  # English text, for the estimate


@dataclass(frozen=True)
class Judged:
    """ratings[i]: those of request i, `NO_RATING` where none could be read; record: who judged, for the result."""

    ratings: list[list[float]]
    record: dict[str, Any]


def judge(
    requests: Sequence[Request],
    *,
    store: Path,
    options: JudgeOptions | None = None,
    progress: Callable[[int], object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Judged:
    """Return `options.judgements` ratings of each request, asking only for those that `store` does not hold.

    Prints calls and tokens to be expected before the first call. Raises UserError where the endpoint is missing or
    fails, another process writes to `store`, or judgements of two judges would be mixed; what was paid is on file then.
    """
    options = options or JudgeOptions()
    environ = os.environ if environ is None else environ  # as it is now: a default would be that of the import
    with Store(store) as stored:
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
            if endpoint.unencrypted_host:
                print(
                    f"warning: the way to the judge at {endpoint.unencrypted_host} is not encrypted: others on it can "
                    "read the key and all texts; use https, or a tunnel to 127.0.0.1",
                    file=sys.stderr,
                    flush=True,
                )
            asyncio.run(_ask_all(missing, endpoint, stored, options, next(iter(versions), None), progress))
        rows = {key: stored.rows[key] for key in wanted}
    ratings = [
        [
            read_rating(rows[request.key(name, index, options)]["judgement"], options.thinking)
            for index in range(options.judgements)
        ]
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
    ratings = [read_ratings(row["judgement"], options.thinking) for row in rows]
    several = [
        {name: row[name] for name in ("question_id", "turn", "index")} | {"ratings": found}
        for row, found in zip(rows, ratings, strict=True)
        if len(found) > 1
    ]
    return {
        "model": name,
        "version": next(iter(_versions(rows)), None),
        "fingerprints": sorted({row["fingerprint"] for row in rows if row["fingerprint"]}),
        "endpoints": sorted({row["endpoint"] for row in rows}),
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "judgements_per_answer": options.judgements,
        "num_judgements": len(rows),
        "thinking": options.thinking,
        "num_invalid_judgements": sum(found[:1] in ([], [NO_RATING]) for found in ratings),
        "num_several_ratings": len(several),
        "several_ratings": several,
        "num_prompt_too_long": sum(row["finish_reason"] == PROMPT_TOO_LONG for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] or 0 for row in rows),
        "completion_tokens": sum(row["completion_tokens"] or 0 for row in rows),
        "first": min(row["time"] for row in rows),
        "last": max(row["time"] for row in rows),
    }


async def _ask_all(
    missing: Mapping[tuple, Request],
    endpoint: Endpoint,
    stored: Store,
    options: JudgeOptions,
    version: str | None,
    progress: Callable[[int], object] | None,
) -> None:
    """Ask for every missing judgement, `options.parallel` at a time, and store each at once.

    version: what the endpoint must answer as, None where no judgement is on file yet.
    """
    places = asyncio.Semaphore(options.parallel)

    def check_version(answered: str) -> None:
        nonlocal version
        version = version or answered
        if answered != version:
            raise UserError(
                f"{endpoint.model} answers as {answered} now, but judged as {version} before, and two judges are not "
                "mixed: name a dated version in JUDGE_MODEL, or move the judgements away"
            )

    async def one(key: tuple, request: Request) -> None:
        async with places:
            answer = await ask_judge(client, endpoint, request.messages, options=options)
        if answer["finish_reason"] != PROMPT_TOO_LONG:
            check_version(answer["judge_version"])
        moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        stored.add(dict(zip(KEY, key, strict=True)) | answer | {"endpoint": endpoint.public_url, "time": moment})
        if progress:
            progress(1)

    items = list(missing.items())
    async with open_client(endpoint, options) as client:
        tasks: list[asyncio.Task] = []
        try:
            # the first only: a wrong key or name costs one call, and the judge's version is known for the others
            for batch in (items[:1], items[1:]):
                tasks = [asyncio.create_task(one(key, request)) for key, request in batch]
                for task in asyncio.as_completed(tasks):
                    await task
        except BaseException as error:
            while pending := [task for task in tasks if not task.done()]:
                for task in pending:
                    if task not in client.exchanging:  # calls under way end, and are stored
                        task.cancel()
                await asyncio.wait(pending, timeout=0.05)
            await asyncio.gather(*tasks, return_exceptions=True)  # the first trouble is the one that is told
            if not isinstance(error, UserError):
                raise
            num_left = sum(key not in stored.rows for key in missing)
            raise UserError(
                f"{error} ({len(missing) - num_left} new judgements are on file, {num_left} are missing: "
                "the next run asks for those only)"
            ) from error
