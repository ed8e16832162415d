"""What an NLU run adds to its result, and tables of such results.

    python -m ba_lora.runs.results_nlu results/runs/minilm-sst2-*.json

prints Markdown, one line a set, metric and method over the seeds: the dev sets, then out-of-domain sets with the drop.
Runs that would share a line must be of different seeds and alike in everything else.
"""

import argparse
import dataclasses
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config.layers import config_of_result
from ba_lora.config.schema import NOT_TRAINING, setting_differences, training_settings
from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.console import console_table, markdown_table
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.glue import find_task
from ba_lora.io import read_json

if TYPE_CHECKING:
    from ba_lora.training.epochs import Epoch


def selection_report(config: NLUConfig, history: list["Epoch"], best: "Epoch", last: "Epoch") -> dict[str, Any]:
    """Return how the epoch was chosen, and what best, last and all epochs scored."""
    task = find_task(config.nlu.task)
    chooser = next(iter(task.dev_sets)) if config.nlu.selection == "paper" else "heldout"
    return {
        "protocol": config.nlu.selection,
        "chosen_by": f"{task.metrics[0]} on {'the dev set' if chooser != 'heldout' else 'held-out training rows'}",
        "best": dataclasses.asdict(best),
        "last": dataclasses.asdict(last),
        "epochs": [dataclasses.asdict(epoch) for epoch in history],
    }


def run_table(results: list[dict[str, Any]]) -> str:
    """Return one line a run: method, task, each metric at the best and at the last epoch, n, seconds, memory."""
    rows = [("method", "task", "selection", "metric", "best", "epoch", "last", "n", "invalid", "train s", "peak MB")]
    for result in results:
        training = result["training"]
        selection = training["selection"]
        for name, score in sorted(result["evaluation"].items()):
            if name not in selection["best"]["metrics"]:
                continue  # an out-of-domain set
            for metric, value in score["metrics"].items():
                last = selection["last"]["metrics"][name]  # those of each class are of the kept epoch only
                rows.append(
                    (
                        result["method"],
                        name,
                        selection["protocol"],
                        metric,
                        _percent(value),
                        f"{selection['best']['epoch']:g}",
                        _percent(last[metric]) if metric in last else "",
                        str(score["n"]),
                        str(score["invalid"]),
                        "" if training["seconds"] is None else f"{training['seconds']:.0f}",
                        f"{training['peak_memory_mb']:.0f}",
                    )
                )
    return console_table(rows)


def seeds_table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table: one line a base, task, method and protocol; mean ± standard deviation over the seeds.

    Raises UserError for runs of one line that differ in more than their seed.
    """
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        selection = result["training"]["selection"]
        for name in selection["best"]["metrics"]:
            if name == "heldout":
                continue
            for metric in result["evaluation"][name]["metrics"]:
                groups[result["base"], name, metric, selection["protocol"], result["method"]].append(result)
    rows = [("base", "set", "metric", "selection", "method", "best epoch", "last epoch", "n", "seeds")]
    for (base, name, metric, protocol, method), runs in sorted(groups.items()):
        _check_repetitions(runs, name)
        best = _spread([run["evaluation"][name]["metrics"][metric] for run in runs])
        last = [run["training"]["selection"]["last"]["metrics"][name] for run in runs]
        cells = [best, _spread([scores[metric] for scores in last]) if metric in last[0] else ""]
        sizes = "/".join(sorted({str(run["evaluation"][name]["n"]) for run in runs}))
        seeds = ", ".join(str(seed) for seed in sorted(run["seed"] for run in runs))
        rows.append((base, name, metric, protocol, method, *cells, sizes, seeds))
    return markdown_table(rows)


def out_of_domain_table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table: one line a base, task, out-of-domain set, protocol and method; mean ± standard deviation
    over the seeds of the task's first metric on the dev set and on that set, and of the drop. Empty where no run has
    such a set. Raises UserError as `seeds_table` does.
    """
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        for name, score in result["evaluation"].items():
            if "drop" in score:
                protocol = result["training"]["selection"]["protocol"]
                groups[result["base"], score["of_task"], name, protocol, result["method"]].append(result)
    if not groups:
        return ""
    names = "base", "task", "metric", "set", "selection", "method", "in domain", "out of domain", "drop", "n", "seeds"
    rows = [names]
    for (base, task, name, protocol, method), runs in sorted(groups.items()):
        _check_repetitions(runs, name)
        scores = [run["evaluation"][name] for run in runs]
        metric = find_task(scores[0].get("definition") or task).metrics[0]
        values = [[s["in_domain"] for s in scores], [s["metrics"][metric] for s in scores], [s["drop"] for s in scores]]
        sizes = "/".join(sorted({str(score["n"]) for score in scores}))
        seeds = ", ".join(str(seed) for seed in sorted(run["seed"] for run in runs))
        rows.append((base, task, metric, name, protocol, method, *map(_spread, values), sizes, seeds))
    return markdown_table(rows)


def _check_repetitions(runs: list[dict[str, Any]], name: str) -> None:
    """Raise UserError unless the runs differ in their seed and in nothing else that the score on `name` depends on."""
    first, *others = runs
    for other in others:
        if changes := setting_differences(_settings(first, name), _settings(other, name)):
            more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
            raise UserError(
                f"{first['run_id']} and {other['run_id']} would be averaged and differ in more than the seed: "
                f"{changes[0]}{more}; give results of one setting for each method"
            )
    by_seed: dict[int, str] = {}
    for run in runs:
        if run["seed"] in by_seed:
            raise UserError(
                f"{by_seed[run['seed']]} and {run['run_id']} would be averaged and are both of seed {run['seed']}: "
                "give one of them"
            )
        by_seed[run["seed"]] = run["run_id"]


def _settings(result: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what runs that are averaged on the set `name` have in common: rows count by what they are, not where."""
    kept = {key: value for key, value in result["config"].items() if key not in NOT_TRAINING}
    settings = training_settings(config_of_result(kept, kind="nlu"))
    for key in ("seed", "features", "reference"):  # for figures; a pass or a cache, the same to rounding
        settings.pop(key, None)
    rows, score = result["data"], result["evaluation"][name]
    for key in ("source", "dev"):
        settings["data"].pop(key)
    settings["data"]["sha256"] = rows["sha256"] or rows["revision"]
    settings["model"]["commit"] = result["model"]["revision"]
    settings["num_processes"] = result["training"]["num_processes"]  # the effective batch grows with it
    settings["evaluation"] = {key: score.get(key) for key in ("version", "data_sha256", "n")}
    return settings


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.2f}"


def _spread(values: list[float | None]) -> str:
    if any(value is None for value in values):
        return "undefined"
    if len(values) == 1:
        return _percent(values[0])
    return f"{_percent(statistics.mean(values))} ± {_percent(statistics.stdev(values))}"


def main() -> None:
    parser = CommandParser(
        prog="python -m ba_lora.runs.results_nlu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path)
    files = parser.parse_args().results
    results = [read_json(file) for file in files]
    if wrong := [str(f) for f, r in zip(files, results, strict=True) if not (r.get("training") or {}).get("selection")]:
        raise UserError(f"{wrong[0]} is no result of a finished NLU run")
    tables = [seeds_table(results), out_of_domain_table(results)]
    print("\n\n".join(table for table in tables if table))


if __name__ == "__main__":
    run_entry_point(main)
