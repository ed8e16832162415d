"""What a search leaves for others: its table of trials, its best config, its cost. All of it follows from the journal.

trials.json     every trial: values, objective, evaluations, seconds, memory, error
trials.csv      the same as a table
best.yaml       the best trial's config, for sh scripts/ba-lora.sh (or nlu.sh) and for tables
"""

import csv
import io
from pathlib import Path
from typing import Any

from ba_lora.config.schema import to_yaml
from ba_lora.experiments.search.best import TRIALS
from ba_lora.experiments.search.journal import PROPOSED, Journal, Trial
from ba_lora.experiments.search.loop import best_of
from ba_lora.experiments.search.trials import TrialRuns
from ba_lora.io import finite, read_object, write_json_atomic, write_text_atomic
from ba_lora.runs.environment import hardware_name

BEST = "best.yaml"


def write_outcome(folder: Path, journal: Journal, runs: TrialRuns, *, ended_early: str | None = None) -> Path | None:
    """Write the files; return the best config's, None where no trial is whole."""
    space, best = journal.space, best_of(journal.trials)
    entries = [finite(_entry(trial, journal)) for trial in journal.trials]
    write_json_atomic(
        folder / TRIALS,
        {
            "title": space.title,
            "space": space.identity(),
            "hardware": _hardware(runs, journal),
            "ended_early": ended_early,
            "best": best.number if best else None,
            "trials": entries,
        },
    )
    write_text_atomic(folder / "trials.csv", _csv(entries, space.objective))
    if best is None:
        return None
    head = f"# Trial {best.number} of {len(entries)} of a search: {' '.join(space.words(best.values))}\n"
    write_text_atomic(folder / BEST, head + to_yaml(runs.best_config(best.values)))
    return folder / BEST


def _entry(trial: Trial, journal: Journal) -> dict[str, Any]:
    outcome, maximise = trial.outcome, journal.space.maximise
    entry: dict[str, Any] = {
        "number": trial.number,
        "status": outcome.status if outcome else PROPOSED,
        "words": journal.space.words(trial.values),
        "values": trial.values,
    }
    if outcome is None:
        return entry
    value = outcome.loss if outcome.loss is None or not maximise else 1 - outcome.loss
    facts = dict(outcome.facts)
    facts.pop("log", None)  # a path of this machine
    return entry | {"value": value, "evaluations": outcome.evaluations} | facts


def _hardware(runs: TrialRuns, journal: Journal) -> str | None:
    for trial in journal.trials:
        for seed in journal.space.seeds:
            path = runs.folder / "trials" / f"t{trial.number:04}-s{seed}" / "train.json"
            if found := (read_object(path) or {}).get("environment"):
                return hardware_name(found)
    return None


def _csv(entries: list[dict[str, Any]], objective: str) -> str:
    keys = list(entries[0]["values"]) if entries else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "status", objective, *keys, "seconds", "peak_memory_mb", "error"])
    for entry in entries:
        memory = [run["peak_memory_mb"] for run in entry.get("runs", []) if run["peak_memory_mb"] is not None]
        row = [entry["number"], entry["status"], entry.get("value"), *entry["values"].values(), entry.get("seconds")]
        writer.writerow([*row, max(memory, default=None), entry.get("error")])
    return text.getvalue()


def summary_lines(journal: Journal) -> list[str]:
    """Return what a search has cost and found, in short."""
    outcomes = [trial.outcome for trial in journal.trials if trial.outcome is not None]
    counts = {
        status: sum(one.status == status for one in outcomes) for status in dict.fromkeys(o.status for o in outcomes)
    }
    seconds = sum(one.facts.get("seconds") or 0 for one in outcomes)
    return [
        f"{', '.join(f'{n} {status}' for status, n in counts.items())} in {seconds:.0f} s of training and evaluation"
    ]
