"""The table of results that a run prints at its end."""

from typing import Any

from ba_lora.config.schema import UNTUNED
from ba_lora.console import console_table


def results_table(results: list[dict[str, Any]]) -> str:
    """Return one line a run and task: method, task, each metric that one of them has in a column of its own (in %; a
    judge's rating from 1 to 10), n, invalid, seconds, peak memory."""
    lines = []
    for result in results:
        training = result.get("training") or {}
        for task, entry in sorted((result.get("evaluation") or {}).items()):
            generation = entry.get("generation") or {}
            metrics = {name: _percent(value) for name, value in entry["metrics"].items() if "rating" not in name}
            if (rating := (entry.get("ratings") or {}).get("overall")) is not None:
                metrics["rating"] = f"{rating:.2f}"
            costs = (training.get("seconds"), generation.get("seconds"), training.get("peak_memory_mb"))
            counts = (str(entry["n"]), str(entry["invalid"]), *map(_number, costs))
            lines.append((result["method"], task, metrics, counts))
    if not lines:
        return "no evaluated run"
    names = list(dict.fromkeys(name for _, _, metrics, _ in lines for name in ("strict", "flexible", *metrics)))
    names = [name for name in names if any(name in metrics for _, _, metrics, _ in lines)]
    rows = [("method", "task", *names, "n", "invalid", "train s", "eval s", "peak MB")]
    rows += [(method, task, *(found.get(name, "") for name in names), *counts) for method, task, found, counts in lines]
    return console_table(rows)


def labelled(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results, the method of each followed by its seed and its λ (consistency/diversity/svd) where these
    differ among them, so that the lines of one table tell what they are of."""
    tuned = [result for result in results if result["method"] != UNTUNED]

    def weights(result: dict[str, Any]) -> str:
        found = result["config"]["regularizers"]
        return "/".join(f"{found[f'lambda_{term}']:g}" for term in ("consistency", "diversity", "svd"))

    words = {"seed": lambda result: str(result["seed"]), "λ": weights}
    words = {name: read for name, read in words.items() if len({read(result) for result in tuned}) > 1}
    return [
        result | {"method": " ".join([result["method"], *(f"{name}={read(result)}" for name, read in words.items())])}
        if result["method"] != UNTUNED
        else result
        for result in results
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
