"""Evaluate classifiers in their domain and out of it, without more tuning: GLUE's dev sets and the sets of GLUE-X.

    python -m eval.nlu --model RUN_DIR [RUN_DIR …] [--task sst2 [imdb yelp …]] [--data imdb=FILE …] [--output DIR]

The first name after --task is the task the run was trained on, the others are out-of-domain sets, and only these are
evaluated. A task of your own may be evaluated on any set, --data OTHER=FILE, in its own columns and labels, or in those
that `sets` in its nlu.task names. Without --task: the run's own task and all its out-of-domain sets for which data is
at hand, in a file named by --data or on the hub; the others are named with the reason. --data takes a local
json/jsonl/parquet/csv/tsv file or a hub name; --max-rows N draws N rows of each set with a fixed seed, and the score of
a set that has more is marked as partial.

In domain is what the kept epoch's model scored on the run's dev set in training, or on the set given by
--data <task>=FILE. The scores of a run's dev sets are made again in each call, from the predictions that training kept:
only that takes no model. A folder without a run's config.yaml needs --task, and its dev set is read like the others.

A run's folder, or DIR (DIR/<run> for several), gets for each set predictions/<set>.jsonl, one line
{"task_id": "imdb/17", "label", "prediction", "logits"} a row, and scores/<set>.json: see nlu_scores.py; beside it how
the set was read (label map, counts of unlabelled, empty and cut rows, the data's sha256), and `in_domain` and `drop`,
of the task's first metric. The run's result in results/runs and its model cards take up the scores. The last line on
stdout sums up all runs.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ba_lora.config.checks import check_place
from ba_lora.config.layers import load_config
from ba_lora.config.methods import tuner_facts
from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.console import console_table
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.experiments.evaluation_state import dev_sources, hub_of
from ba_lora.glue import find_task, task_word
from ba_lora.io import sha256_file, write_json_atomic, write_jsonl_atomic
from ba_lora.paths import ADAPTER_CONFIG
from ba_lora.rows import Source
from ba_lora.runs.card import refresh_run
from ba_lora.runs.results import read_record
from eval.classify import Classifier, classify, open_classifier
from eval.nlu_scores import dev_scores, score_predictions
from eval.options import read_data
from eval.tasks.glue import Examples, own_sets, to_examples
from eval.tasks.glue_x import find_set, out_of_domain

SAMPLE_SEED = 0
PACKAGES = ("scikit-learn", "scipy", "torch", "transformers")


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished run, or a bare model folder (config None): what to evaluate, where its results go.

    dev_scores: dev set → its score in training. training_counts: class → rows in training; None for a regression, and
    where it is not known.
    """

    name: str
    model_path: Path
    output: Path
    task: str
    config: NLUConfig | None = None
    dev_scores: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    training_counts: Mapping[str, int] | None = None

    @property
    def own_set(self) -> str:
        """The dev set that stands for the run's domain."""
        return next(iter(own_sets(self.task)))


def find_run(folder: Path, *, task: str | None, output: Path | None) -> EvaluatedRun:
    """Return what is known of a run's or model's folder. Raises UserError where it is neither, or of another task."""
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give a finished run's folder")
    output = output or folder
    if not (folder / "config.yaml").is_file():
        if task is None:
            raise UserError(f"{folder} has no config.yaml, so its task is not known: add --task")
        return EvaluatedRun(folder.name, folder, output, task)
    config = dataclasses.replace(_config(folder), output_dir=str(folder))
    if task is not None and find_task(task).name != config.nlu.name:
        raise UserError(f"{folder} was trained on {config.nlu.name}: put that first after --task, not {task}")
    data = read_record(folder / "train.json", "data", fix="run the training again")["data"]
    return EvaluatedRun(
        folder.name,
        folder / ("merged" if tuner_facts(config.adapter)["merges"] else "adapter"),
        output,
        task_word(config.nlu.task),
        config,
        dev_scores=dev_scores(folder, config, data),
        training_counts=data["classes"],
    )


def _config(folder: Path) -> NLUConfig | None:
    if not (folder / "config.yaml").is_file():
        return None
    return load_config(folder / "config.yaml", kind="nlu", checked=False)


@dataclass(frozen=True)
class LoadedSet:
    """The examples of one set for one task, and where they came from; num_missing: those that --max-rows left out."""

    name: str
    examples: Examples
    source: Source
    num_rows: int
    label_map: Mapping[str, str]
    num_missing: int = 0


class Sets:
    """The sets, each read once for all runs of a task. given: set → local file or hub name."""

    def __init__(self, given: Mapping[str, str], *, max_rows: int | None) -> None:
        self.given = given
        self._max_rows = max_rows
        self._found: dict[tuple[str, str], LoadedSet | UserError] = {}

    def get(self, task: str, name: str) -> LoadedSet:
        """Return the set `name` for `task`, from its file, else the hub. Raises UserError where it is not to be had."""
        if (task, name) not in self._found:
            try:
                self._found[task, name] = self._load(task, name)
            except UserError as error:
                self._found[task, name] = error
        found = self._found[task, name]
        if isinstance(found, UserError):
            raise found
        return found

    def _load(self, task: str, name: str) -> LoadedSet:
        of, label_map = find_set(task, name)
        rows, source = of.load(self.given.get(name))
        examples = to_examples(rows, of, task=find_task(task), label_map=label_map, source=source.name)
        num_missing = 0
        if self._max_rows is not None and len(examples.examples) > self._max_rows:
            num_missing = len(examples.examples) - self._max_rows
            examples = _sample(examples, self._max_rows)
        return LoadedSet(name, examples, source, len(rows), label_map, num_missing)


def _sample(examples: Examples, num_rows: int) -> Examples:
    """Return a seeded sample in the file's order: the first rows of a set may all be of one class."""
    chosen = sorted(random.Random(SAMPLE_SEED).sample(range(len(examples.examples)), num_rows))
    kept = [examples.examples[index] for index in chosen]
    num_empty = sum(not all(text.strip() for text in example.texts) for example in kept)
    return dataclasses.replace(examples, examples=kept, num_empty=num_empty)


def evaluate_set(classifier: Classifier, run: EvaluatedRun, loaded: LoadedSet) -> dict[str, Any]:
    """Predict and score one set; write its predictions, return its score."""
    from ba_lora.models.predict import prediction_lines

    task, examples = find_task(run.task), loaded.examples.examples
    started = time.perf_counter()
    logits, num_truncated = classify(classifier, [example.texts for example in examples])
    seconds = time.perf_counter() - started
    labels = [example.label if task.is_regression else task.labels.index(example.label) for example in examples]
    lines = prediction_lines([example.task_id for example in examples], labels, logits)
    predictions_path = run.output / "predictions" / f"{loaded.name}.jsonl"
    write_jsonl_atomic(predictions_path, lines)
    score = score_predictions(
        lines,
        name=loaded.name,
        of_task=run.task,
        training_counts=run.training_counts,
        imbalanced=run.config is not None and run.config.data.is_imbalanced,
    )
    if loaded.num_missing:  # as a score of the first answers only tells it
        limit = {"limit": len(examples)}
        score |= {"partial": True, "num_missing": loaded.num_missing, "generation": limit}
    return score | {
        "classes": list(task.labels),
        "label_map": dict(loaded.label_map),
        "num_rows": loaded.num_rows,
        "num_unlabelled": loaded.examples.num_unlabelled,
        "num_empty": loaded.examples.num_empty,
        "num_truncated": num_truncated,
        "max_length": classifier.max_length,
        "data": loaded.source.name,
        "data_sha256": loaded.source.as_result(),
        "predictions_sha256": sha256_file(predictions_path),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "seconds": round(seconds, 2),
    }


@dataclass(frozen=True)
class Plan:
    """What evaluating a run takes.

    wanted: the out-of-domain sets asked for; trained: dev set → its score in training; skipped: set → why.
    """

    run: EvaluatedRun
    wanted: Sequence[str]
    trained: Mapping[str, Mapping[str, Any]]
    to_predict: Sequence[LoadedSet]
    skipped: Mapping[str, str]


def plan_run(run: EvaluatedRun, sets: Sets, names: Sequence[str] | None) -> Plan:
    """Return what is to be done for a run, the sets read.

    names: the out-of-domain sets that must be evaluated; None: those for which data is at hand. Raises UserError for a
    set that is not to be had, a run without the model that must predict, and one that training scored on other data.
    """
    wanted = out_of_domain(run.task) if names is None else names
    if names is None and find_task(run.task).is_own:
        wanted = list(dict.fromkeys([*wanted, *sets.given]))
    trained, to_predict, skipped = {}, [], {}
    for name in dict.fromkeys([run.own_set, *run.dev_scores, *wanted]):
        if name in run.dev_scores and name not in sets.given:
            trained[name] = run.dev_scores[name]
            _refuse_other_data(run, name)
            continue
        try:
            to_predict.append(sets.get(run.task, name))
        except UserError as error:
            if name == run.own_set or names is not None or name in sets.given:
                raise
            skipped[name] = str(error)
    needed = ADAPTER_CONFIG if run.model_path.name == "adapter" else "config.json"
    if to_predict and run.config and not (run.model_path / needed).is_file():
        fix = ", with export.merged=true" if run.model_path.name == "merged" else ""
        raise UserError(
            f"{run.name} has no {run.model_path.name}/ to predict {', '.join(loaded.name for loaded in to_predict)} "
            f"with: finish the run{fix}"
        )
    return Plan(run, wanted, trained, to_predict, skipped)


def _refuse_other_data(run: EvaluatedRun, name: str) -> None:
    made_from, pinned = hub_of(run.dev_scores[name]), dev_sources(run.config)[name]
    if made_from and pinned and made_from != pinned:
        raise UserError(
            f"{run.name}: training predicted {name} of {made_from}, pinned is {pinned}: train again with "
            f"overwrite=true, or have the pinned rows predicted with --data {name}={pinned}"
        )


def evaluate_classifier(plan: Plan) -> dict[str, Any]:
    """Evaluate one run in its domain and out of it; write the scores, return the summary."""
    run, skipped = plan.run, plan.skipped
    scores = {name: dict(score) for name, score in plan.trained.items()}
    if plan.to_predict:
        max_length = run.config.data.max_length if run.config else None
        classifier = open_classifier(run.model_path, find_task(run.task), max_length=max_length)
        for loaded in plan.to_predict:
            scores[loaded.name] = evaluate_set(classifier, run, loaded)
    asked = {name: scores[name] for name in plan.wanted if name in scores and name != run.own_set}
    metric = find_task(run.task).metrics[0]
    in_domain = scores[run.own_set]["metrics"][metric]
    for name, score in scores.items():
        if name != run.own_set:
            score |= {"in_domain": in_domain, "drop": _drop(in_domain, score["metrics"][metric])}
        write_json_atomic(run.output / "scores" / f"{name}.json", score)
        if name == run.own_set or name in asked:
            print(_line(run, score), flush=True)
    for name, reason in skipped.items():
        print(f"note: {run.name}: {name} is left out: {reason}", file=sys.stderr)
    if run.config and run.output == run.config.run_path:
        refresh_run(run.output, run.config)
    return {
        "run": run.name,
        "task": find_task(run.task).name,
        "metric": metric,
        "in_domain": in_domain,
        "out_of_domain": {name: score["metrics"][metric] for name, score in asked.items()},
        "drop": {name: score["drop"] for name, score in asked.items()},
        "skipped": skipped,
    }


def _drop(in_domain: float | None, value: float | None) -> float | None:
    return None if None in (in_domain, value) else round(in_domain - value, 6)


def _line(run: EvaluatedRun, score: Mapping[str, Any]) -> str:
    metrics = " ".join(
        f"{name}={'undefined' if value is None else f'{value:.4f}'}" for name, value in score["metrics"].items()
    )
    counts = "".join(
        f" {name.removeprefix('num_')}={score[name]}"
        for name in ("invalid", "num_missing", "num_unlabelled", "num_empty", "num_truncated")
        if score.get(name)
    )
    notes = "".join(f" ({name} {note})" for name, note in score["notes"].items() if name in score["metrics"])
    return f"{run.name} {score['task']}: {metrics} n={score['n']}{counts}{notes}"


def summary_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return one line a run: the metric in its domain, and on each out-of-domain set with the drop."""
    names = list(dict.fromkeys(name for summary in summaries for name in summary["out_of_domain"]))
    rows = [["run", "metric", "in domain", *names]]
    for summary in summaries:
        cells = [_cell(summary["out_of_domain"].get(name), summary["drop"].get(name)) for name in names]
        rows.append([summary["run"], summary["metric"], _cell(summary["in_domain"]), *cells])
    return console_table(rows)


def _cell(value: float | None, drop: float | None = None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f}" + ("" if drop is None else f" (drop {100 * drop:.2f})")


def _read_command(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m eval.nlu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, nargs="+", required=True, metavar="RUN_DIR")
    parser.add_argument("--task", nargs="+", metavar="NAME")
    parser.add_argument("--data", nargs="+", default=[], metavar="SET=FILE")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--max-rows", type=int)
    parsed = parser.parse_args(arguments)
    if parsed.max_rows is not None and parsed.max_rows < 1:
        raise UserError(f"--max-rows {parsed.max_rows}: a number of at least 1 is needed")
    return parsed


def check(arguments: Sequence[str]) -> None:
    """Raise the UserError that the command, with its --task, would end with, as far as no model and no data of the hub
    is needed."""
    parsed = _read_command(arguments)
    if not parsed.task:
        raise UserError("--task is needed to check the command without its runs; see python -m eval.nlu --help")
    task, *names = parsed.task
    find_task(task)
    sets = Sets(_read_data(parsed.data, {task}), max_rows=parsed.max_rows)
    for name in names:
        find_set(task, name)
    for name, data in sets.given.items():
        if Path(data).exists():
            sets.get(task, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parsed = _read_command(arguments)
    task, names = (parsed.task[0], parsed.task[1:]) if parsed.task else (None, None)
    folders = list(dict.fromkeys(folder.resolve() for folder in parsed.model))
    if parsed.output and len({folder.name for folder in folders}) < len(folders):
        raise UserError("--output: two of the models' folders have the same name; evaluate them one by one")
    several = parsed.output is not None and len(folders) > 1
    if parsed.output:
        check_place(parsed.output, "--output")
    own = {run.nlu.name: task_word(run.nlu.task) for run in map(_config, folders) if run}
    task = own.get(task, task)  # a task of one's own is known by its name to the runs that were trained on it
    if task is not None:
        find_task(task)
    runs = [
        find_run(folder, task=task, output=parsed.output / folder.name if several else parsed.output)
        for folder in folders
    ]
    sets = Sets(_read_data(parsed.data, {run.task for run in runs}), max_rows=parsed.max_rows)
    plans = [plan_run(run, sets, names) for run in runs]  # first: what is missing is told before anything is predicted
    summaries = [evaluate_classifier(plan) for plan in plans]
    print(summary_table(summaries))
    print(json.dumps({"runs": summaries}, ensure_ascii=False))
    return 0


def _read_data(words: Sequence[str], tasks: set[str]) -> dict[str, str]:
    known = [name for task in sorted(tasks) for name in (*own_sets(task), *out_of_domain(task))]
    is_own = any(find_task(task).is_own for task in tasks)  # any further set, in the task's own columns
    return read_data(words, known, further=is_own)


if __name__ == "__main__":
    run_entry_point(main)
