"""Any task of lm-evaluation-harness on a run or a model: `sh scripts/harness.sh` calls this.

    python -m eval.harness MODEL TASK … [--data TASK=FILE …] [--include-path DIR …] [--engine auto|hf|vllm] [--limit N]
                           [--shots N] [--batch-size N] [--dtype NAME] [--template chat|FILE] [--revision COMMIT]
                           [--output DIR]

MODEL is a run's folder (its merged model, else its adapter on the base), a model or adapter folder, or a hub id. The
harness runs in .cache/lm-eval, an environment of its own. TASK is a name that the harness knows, or one of
eval/lm_eval. --data reads a task's rows from a local file (json, jsonl, parquet, csv, tsv; MGSM's published tsv) in the
columns that the task reads; without it they come from the hub. --include-path adds task files of your own.

Each score is written to RUN/scores/harness/<task>.json, and so into the run's result as harness/<task>:

    {"task", "version", "n", "shots", "invalid": 0, "metrics", "stderr", "interval_95", "partial", "num_missing",
     "generation": {"harness", "engine", "engine_version", "dtype", "template", "limit", "shots"}, "data_sha256"}

A metric is named as the harness names it, with its filter where it has one (exact_match_flexible_extract). interval_95
is the harness's own standard error times 1.96. n counts the rows that were asked, num_missing those that --limit left
out. `generation` says how they were asked: harness and engine_version are versions, limit and shots are what the call
asked for (None: all rows, the task's own number). A run that was trained in a chat template is asked in it, any other
model in that of --template; `template` has its hash, None for the plain questions. Of models that are no run, and with
--template, --output DIR says where the scores go.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ba_lora.chat import is_chat, load_chat, read_template, text_hash
from ba_lora.config.checks import check_place
from ba_lora.config.layers import load_run
from ba_lora.config.schema import HARNESS as PREFIX
from ba_lora.console import console_table
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.io import read_object, sha256_file, write_json_atomic, write_jsonl_atomic
from ba_lora.paths import ADAPTER_CONFIG, PROJECT_ROOT, resolve_path
from ba_lora.rows import load_rows
from ba_lora.runs.card import refresh_run
from eval.engines import base as engines
from eval.engines.adapters import adapter_rank, vllm_lora_rank
from eval.engines.base import EngineOptions
from eval.engines.open import check_engine, choose_engine
from eval.engines.serving import ServedModel, kept_template, plan_serving
from eval.options import read_data
from eval.tasks import TASKS

ENVIRONMENT = PROJECT_ROOT / ".cache" / "lm-eval"
DRIVER = PROJECT_ROOT / "eval" / "lm_eval" / "driver.py"


def read_words(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what a command line asks for. Raises UserError."""
    parser = CommandParser(
        prog="sh scripts/harness.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", metavar="MODEL TASK", help="the model, then tasks; or by --model and --task"
    )
    parser.add_argument("--model", help="a run, model or adapter folder, or a hub id")
    parser.add_argument("--task", nargs="+", default=[], help="tasks of the harness")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--data", nargs="+", default=[], metavar="TASK=FILE")
    parser.add_argument("--include-path", "--include_path", nargs="+", default=[], metavar="DIR")
    parser.add_argument("--engine", default="hf", help="hf, vllm or auto")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--shots", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--dtype", help="of the weights; default: that of the run's training, of others the checkpoint's (CPU: float32)"
    )
    parser.add_argument("--template", help="of no run: chat, the tokenizer's own chat template, or a Jinja file")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_intermixed_args(arguments)
    if asked.model is None and asked.words:
        asked.model = asked.words.pop(0)
    asked.tasks = list(dict.fromkeys(task.removeprefix(PREFIX) for task in (*asked.task, *asked.words)))
    if asked.model is None or not asked.tasks:
        raise UserError("a model and at least one task are needed: sh scripts/harness.sh RUN TASK")
    asked.model = str(resolve_path(asked.model)) if resolve_path(asked.model).exists() else asked.model
    for name in ("limit", "batch_size"):
        if getattr(asked, name) is not None and getattr(asked, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(asked, name)}: a number of at least 1 is needed")
    if asked.shots is not None and asked.shots < 0:
        raise UserError(f"--shots {asked.shots}: a number of at least 0 is needed")
    EngineOptions(dtype=asked.dtype or "auto")  # checks it
    _check_template(asked.template, asked.output)
    asked.files = read_data(asked.data, asked.tasks, prefix=PREFIX)
    asked.folders = [str(DRIVER.parent), *(str(resolve_path(folder)) for folder in asked.include_path)]
    if missing := [folder for folder in asked.folders if not Path(folder).is_dir()]:
        raise UserError(f"--include-path: no such folder: {missing[0]}")
    return asked


def _check_template(template: str | None, output: Path | None) -> None:
    """Raise UserError for a --template that is none, or without a place of its own for the scores."""
    if template is None:
        return
    if not is_chat(template):
        raise UserError(f"--template {template} is unknown: chat or a Jinja file (FILE.jinja) is needed")
    if template != "chat":
        read_template(template)
    if output is None:
        raise UserError(
            f"--template {template} needs --output DIR: the scores in a run's folder are of the template that it was "
            "trained in"
        )


def call_driver(request: Mapping[str, Any]) -> dict[str, Any]:
    """Have the harness do what is asked (eval/lm_eval/driver.py), in its environment. Raises UserError in one line."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.is_file():
        raise UserError("lm-evaluation-harness is not set up: sh scripts/harness.sh --setup")
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json_atomic(asked, dict(request) | {"folder": folder})
        done = subprocess.run(
            [python, DRIVER, asked, answer], cwd=PROJECT_ROOT, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
        )
        found = read_object(answer)
    if found is None:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"lm-evaluation-harness ended with status {done.returncode}: {last[:300]}")
    if "error" in found:
        raise UserError(found["error"])
    return found


def chat_template(served: ServedModel, asked: str | None) -> str | None:
    """Return the text of the chat template that questions are put into: the one asked for, else the one that the run
    was trained in; None: none. Raises UserError where the model has no template of its own."""
    if asked is None:
        return kept_template(served.trained_in)
    tokenizer = engines.load_base_tokenizer(served.base, EngineOptions(revision=served.revision))
    return load_chat(tokenizer, asked).text


def served_dtype(served: ServedModel, asked: str | None) -> str:
    """Return the dtype of the weights: the one asked for, else the one that the run's base was trained in, of a model
    that is no run what eval.generate takes."""
    if asked is None and served.trained_in is not None:
        return load_run(served.trained_in).model.dtype
    config = engines.load_base_config(served.base, EngineOptions(revision=served.revision))
    return engines.resolve_dtype(asked or "auto", config)


def tokenizer_with(served: ServedModel, template: str, folder: Path) -> Path:
    """Write the model's tokenizer with a chat template into a folder, which it returns."""
    tokenizer = engines.load_base_tokenizer(served.base, EngineOptions(revision=served.revision))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def model_arguments(
    served: ServedModel, engine: str, *, dtype: str = "auto", tokenizer: Path | None = None
) -> dict[str, Any]:
    """Return the harness's model_args for a model as it is served; tokenizer: a folder with another one than its own,
    that holds a chat template."""
    arguments: dict[str, Any] = {"pretrained": served.base, "dtype": dtype}
    if served.revision is not None:
        arguments["revision"] = served.revision
    if tokenizer is not None:
        arguments["tokenizer"] = str(tokenizer)
    if served.adapter is not None:
        arguments["peft" if engine == "hf" else "lora_local_path"] = str(served.adapter)
    if engine == "vllm":
        settings = read_object(served.adapter / ADAPTER_CONFIG) if served.adapter else None
        arguments |= {"max_lora_rank": vllm_lora_rank(adapter_rank(settings)), "enable_lora": True} if settings else {}
        return arguments | {"gpu_memory_utilization": 0.85}
    return arguments


def jsonl_of(task: str, file: str, folder: Path) -> str:
    """Return a jsonl file with the rows of a local file; MGSM's published tables are given the hub's columns."""
    if task.startswith("mgsm_"):
        language = next((name for name in TASKS if name.startswith("mgsm_") and task.endswith(name[-3:])), None)
        if language is not None:
            items, _ = TASKS[language].load(file)
            number = {item.task_id: float(item.gold.replace(",", "")) for item in items}
            rows = [
                {"question": item.instruction, "answer": None, "answer_number": _whole(number[item.task_id])}
                for item in items
            ]
            write_jsonl_atomic(folder / f"{task}.jsonl", rows)
            return str(folder / f"{task}.jsonl")
    rows, _ = load_rows(file)
    write_jsonl_atomic(folder / f"{task}.jsonl", rows)
    return str(folder / f"{task}.jsonl")


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def to_score(task: str, found: Mapping[str, Any], *, generation: Mapping[str, Any], file: str | None) -> dict[str, Any]:
    """Return the score of one task from what the driver tells of it; generation: how it was asked, see the head."""
    metrics, stderr = {}, {}
    for key, value in found["results"].items():
        name, _, of = key.partition(",")
        name = f"{name}_{of}" if of not in ("", "none") else name
        name = name.replace("-", "_")
        if "_stderr" in name:
            stderr[name.replace("_stderr", "", 1)] = value
        elif of:
            metrics[name] = value
    intervals = {
        name: [value - 1.96 * stderr[name], value + 1.96 * stderr[name]]
        for name, value in metrics.items()
        if name in stderr
    }
    return {
        "task": f"{PREFIX}{task}",
        "version": str(found["version"]),
        "n": found["n"],
        "shots": found["shots"],
        "invalid": 0,
        "metrics": metrics,
        "stderr": stderr,
        "interval_95": intervals,
        "partial": found["num_missing"] > 0,
        "num_missing": found["num_missing"],
        "generation": dict(generation),
        "data_sha256": sha256_file(file) if file and Path(file).is_file() else None,
    }


def evaluate_by_harness(asked: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Evaluate, write the scores, and return them by task."""
    check_engine(asked.engine)
    (served,) = plan_serving([asked.model], revision=asked.revision)
    if served.run is None and asked.output is None:
        raise UserError(f"{asked.model} is no run folder: say with --output DIR where the scores go")
    folder = asked.output or served.run / "scores"
    check_place(folder, "--output" if asked.output else "scores")
    template = chat_template(served, asked.template)
    dtype = served_dtype(served, asked.dtype)
    engine = choose_engine(asked.engine, served.base, EngineOptions(dtype=dtype, revision=served.revision))
    with tempfile.TemporaryDirectory() as place:
        tokenizer = served.adapter if template is not None else None
        if template is not None and asked.template is not None:
            tokenizer = tokenizer_with(served, template, Path(place) / "tokenizer")
        request = {
            "tasks": asked.tasks,
            "include_path": asked.folders,
            "data": {task: jsonl_of(task, file, Path(place)) for task, file in asked.files.items()},
            "check": False,
            "limit": asked.limit,
            "shots": asked.shots,
            "chat": template is not None,
            "model": engine,
            "model_args": model_arguments(served, engine, dtype=dtype, tokenizer=tokenizer),
            "batch_size": asked.batch_size,
        }
        found = call_driver(request)
    made = {
        "harness": found["version"],
        "engine": engine,
        "engine_version": found["engine_version"],
        "dtype": dtype,
        "template": None if template is None else text_hash(template),
        "limit": asked.limit,
        "shots": asked.shots,
    }
    scores = {}
    for task, result in found["tasks"].items():
        scores[task] = to_score(task, result, generation=made, file=asked.files.get(task))
        write_json_atomic(folder / PREFIX / f"{task}.json", scores[task])
    if served.run is not None and asked.output is None:
        refresh_run(served.run, load_run(served.run))
    return scores


def check(arguments: Sequence[str]) -> None:
    """Raise the UserError that the command would end with, as far as no model is needed: its words, its files, tasks
    that the harness does not know."""
    asked = read_words(arguments)
    check_engine(asked.engine)
    for task, file in asked.files.items():
        if Path(file).is_absolute() and not Path(file).exists():
            raise UserError(f"--data {task}: no such file: {file}")
    files = [(task, file) for task, file in asked.files.items() if Path(file).exists()]
    _check_tasks(tuple(asked.tasks), tuple(files), tuple(asked.folders), asked.shots)


@functools.cache  # eval.check asks for each model of a table, and the harness takes seconds to know its own tasks
def _check_tasks(
    tasks: tuple[str, ...], files: tuple[tuple[str, str], ...], folders: tuple[str, ...], shots: int | None
) -> None:
    with tempfile.TemporaryDirectory() as place:
        data = {task: jsonl_of(task, file, Path(place)) for task, file in files}
        request = {"tasks": tasks, "include_path": folders, "check": True}
        call_driver(request | {"data": data, "shots": shots})


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, evaluate, print one line a metric and the scores as JSON."""
    scores = evaluate_by_harness(read_words(arguments))
    rows = [("task", "metric", "value", "± 1.96 stderr", "n", "shots")]
    for score in scores.values():
        for name, value in score["metrics"].items():
            error = f"{1.96 * score['stderr'][name]:.4f}" if name in score["stderr"] else ""
            rows.append((score["task"], name, f"{value:.4f}", error, str(score["n"]), str(score["shots"])))
    print(console_table(rows))
    print(json.dumps(scores, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
