"""Runs lm-evaluation-harness, in its own environment: a request as JSON in, a JSON object out, both by file.

    python eval/lm_eval/driver.py REQUEST.json ANSWER.json

request: tasks, include_path (folders), data (task → jsonl file of rows), model, model_args, limit, shots, chat (true:
questions are put into the tokenizer's chat template), batch_size, check (true: find the tasks and stop), folder (for
files in between). answer: {"error"} in one line, or {"version", "engine_version", "tasks": name → …}. eval/harness.py
writes the one and reads the other.
"""

import difflib
import importlib
import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Iterable
from typing import Any


def evaluate(request: dict[str, Any]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=request["include_path"])
    known = set(manager.all_tasks)
    for name in request["tasks"]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f" (nearest: {', '.join(near)})" if near else ""
            return {
                "error": f"lm-evaluation-harness has no task {name}{hint}; --include-path DIR (in a config "
                "eval.harness.include_path) adds tasks of your own"
            }
    for name in request["data"]:
        if several := group_refusal(name, manager.task_index):
            return {"error": f"--data {name}: {several}"}
    files = {name: local_task(name, file, manager, request["folder"]) for name, file in request["data"].items()}
    for name, file in files.items():
        task = manager.load(file)["tasks"][name]
        shots = task.get_config("num_fewshot")
        if shots != 0 and request["shots"] is not None:  # a task that says 0 keeps it
            shots = request["shots"]
        if shots and not getattr(task.get_config("fewshot_config"), "samples", None):
            return {
                "error": f"--data {name}: the task shows {shots} examples, which would be rows of the file that is "
                f"evaluated: use --shots 0 (in a config eval.harness.shots={{harness/{name}: 0}})"
            }
    if request["check"]:
        return {"version": importlib.metadata.version("lm-eval"), "tasks": {}}

    import lm_eval
    import torch

    found = lm_eval.simple_evaluate(
        model=request["model"],
        model_args=request["model_args"],
        tasks=[files.get(name, name) for name in request["tasks"]],
        task_manager=manager,
        limit=request["limit"],
        num_fewshot=request["shots"],
        apply_chat_template=request["chat"],
        batch_size=request["batch_size"],
        device="cuda" if torch.cuda.is_available() else "cpu",
        bootstrap_iters=1000,
        log_samples=False,
        random_seed=0,
        numpy_random_seed=1234,
        torch_random_seed=1234,
        fewshot_random_seed=1234,
    )
    members = found.get("group_subtasks", {})
    return {
        "version": importlib.metadata.version("lm-eval"),
        "engine_version": importlib.import_module("vllm" if request["model"] == "vllm" else "transformers").__version__,
        "tasks": {
            name: {
                "results": {key: value for key, value in result.items() if is_number(value)},
                "version": found["versions"].get(name),
                "shots": found["n-shot"].get(name),
                **row_counts(leaves(name, members), found.get("n-samples", {})),
            }
            for name, result in found["results"].items()
        },
    }


def row_counts(tasks: Iterable[str], samples: dict[str, dict[str, int]]) -> dict[str, int]:
    """Return how many rows of some tasks were asked, and how many a limit left out."""
    counts = [samples[task] for task in tasks if task in samples]
    asked = sum(count["effective"] for count in counts)
    return {"n": asked, "num_missing": sum(count["original"] for count in counts) - asked}


def group_refusal(name: str, index: dict[str, Any]) -> str | None:
    """Return, of a name that stands for several tasks (a group, or the harness's tags), why it takes no file; None of a
    task. index: the harness's, from its task files: no task is loaded, as its data would be."""
    below = {one: children(entry) for one, entry in index.items() if entry.kind.name in ("GROUP", "TAG")}
    if name not in below:
        return None
    found = sorted(leaves(name, below) - {name})
    if not found:
        return (
            "it names a group of tasks without names of their own, and a file has the rows of one: choose another task"
        )
    shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
    return (
        f"it names {len(found)} of the harness's tasks ({shown}), and a file has the rows of one: ask for such a task "
        "by its name, with its file"
    )


def children(entry: Any) -> list[str]:
    """Return the names that stand directly below a group or tag of the harness's index; a group may hold tasks without
    one (t0_eval does)."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task") or []
    names = [one if isinstance(one, str) else one.get("group") or one.get("task") for one in listed]
    return [name for name in names if name]


def leaves(name: str, members: dict[str, list[str]]) -> set[str]:
    """Return the tasks of a group, and of the groups in it; of a task itself."""
    below = members.get(name) or []
    return set().union(*(leaves(one, members) for one in below)) if below else {name}


def is_number(value: object) -> bool:
    """Whether a metric has a value; BBQ's scores of categories that are not in the rows are NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def local_task(name: str, file: str, manager: Any, folder: str) -> str:
    """Return a task file that is the harness's task with its rows, of any split that it reads, from a jsonl file."""
    path = os.path.join(folder, f"{name}.yaml")
    files = dict.fromkeys(("train", "validation", "test"), file)
    changes = {"include": str(manager.task_index[name].yaml_path), "task": name, "dataset_path": "json"}
    changes |= {"dataset_name": None, "dataset_kwargs": {"data_files": files}}
    with open(path, "w", encoding="utf-8") as made:
        json.dump(changes, made)  # JSON is YAML
    return path


def main() -> None:
    request_path, answer_path = sys.argv[1:]
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    try:
        answer = evaluate(request)
    except Exception as error:  # the harness raises many kinds; the last line of the cause is the one to tell
        text = " ".join(str(error).split()) or type(error).__name__
        answer = {"error": f"{type(error).__name__}: {text}"[:400]}
    with open(answer_path, "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
