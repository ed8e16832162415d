"""What is left to do costs: hours where a like run has been measured, disk where a like run lies on it, else blank.

Time of a run, from the results below results/: the median seconds of runs of the same recipe (other seeds count),
else tokens over the median tokens a second of the same model and method; only of the hardware that most results of that
model were measured on, which is named. Generation is added where its tasks have been measured for the model on it.
What is trained already costs no training; what is only scored again counts as nothing.
"""

import dataclasses
import os
import re
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ba_lora.experiments.spec import Spec
from ba_lora.experiments.state import RunState
from ba_lora.io import read_object
from ba_lora.paths import PROJECT_ROOT
from ba_lora.runs.environment import hardware_name

RESULTS_PATH = PROJECT_ROOT / "results"
_RECIPE = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")


_USED = {"model", "method", "adapter", "data", "trainer"}  # of a result's config


def estimate_lines(left: Sequence[tuple[Spec, RunState]], *, results_path: Path = RESULTS_PATH) -> list[str]:
    """Return the lines of --dry-run on time and disk for runs that are yet to be done, each with its state.

    A file among the results that is none, or cannot be read, is left out and named.
    """
    found = {path: read_object(path) for path in sorted(results_path.rglob("runs/*.json"))}
    results = {path: result for path, result in found.items() if result and _is_usable(result)}
    measured = Measured(list(results.values()))
    costly = [(spec, state) for spec, state in left if state.generates]
    hours: dict[str, float] = defaultdict(float)
    known = 0
    for spec, state in costly:
        cost = measured.seconds(dataclasses.asdict(spec.config), train=state.train)
        if cost is not None:
            hours[cost[1]] += cost[0] / 3600
            known += 1
    lines = [f"time: {path} is no result, or damaged: left out" for path in found if path not in results]
    for hardware, number in sorted(hours.items()):
        lines.append(f"time: about {_duration(number)} of {hardware}, for one run at a time")
    if known < len(costly):
        unknown = f"{len(costly) - known} of {len(costly)} runs"
        lines.append(f"time: not known for {unknown}: none like them has been measured")
    return lines + _disk_lines([spec for spec, state in left if state.train])


def _is_usable(result: dict[str, Any]) -> bool:
    config = result.get("config")
    return isinstance(config, dict) and config.keys() >= _USED


def _duration(hours: float) -> str:
    return f"{hours:.0f} hours" if hours >= 10 else f"{hours:.2g} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


class Measured:
    """What result files tell of time."""

    def __init__(self, results: Sequence[dict[str, Any]]) -> None:
        trained = [result for result in results if (result.get("training") or {}).get("seconds")]
        used: dict[str, Counter[str]] = defaultdict(Counter)  # model → how many results of each hardware
        for result in trained:
            used[_model(result["config"])][hardware_name(result.get("environment") or {})] += 1
        self._hardware = {model: counts.most_common(1)[0][0] for model, counts in used.items()}
        self._recipes: dict[str, list[float]] = defaultdict(list)
        self._speeds: dict[tuple[str, str], list[float]] = defaultdict(list)  # tokens a second
        self._row_tokens: dict[tuple[str, int], list[float]] = defaultdict(list)
        self._generation: dict[tuple[str, str], list[float]] = defaultdict(list)
        for result in results:
            config, data = result["config"], result.get("data") or {}
            if data.get("tokens") and data.get("rows_used"):
                self._row_tokens[_rows(config)].append(data["tokens"] / data["rows_used"])
            if not self._is_of_the_hardware(result):
                continue
            for task, entry in (result.get("evaluation") or {}).items():
                if seconds := (entry.get("generation") or {}).get("seconds"):
                    self._generation[_model(config), task].append(seconds)
        for result in trained:
            config, seconds = result["config"], result["training"]["seconds"]
            if not self._is_of_the_hardware(result):
                continue
            self._recipes[_recipe(config)].append(seconds)
            tokens = (result.get("data") or {}).get("tokens")
            if tokens and "max_steps" not in config["trainer"]:
                epochs = config["trainer"].get("num_train_epochs", 3)
                self._speeds[_model(config), config["method"]].append(tokens * epochs / seconds)

    def _is_of_the_hardware(self, result: dict[str, Any]) -> bool:
        return hardware_name(result.get("environment") or {}) == self._hardware.get(_model(result["config"]))

    def seconds(self, config: dict[str, Any], *, train: bool = True) -> tuple[float, str] | None:
        """Return (seconds, hardware) of training and generation, without `train` of generation only; None where
        neither recipe nor speed is known, or nothing of the generation that is all there is to do."""
        hardware = self._hardware.get(_model(config))
        training = self._training_seconds(config) if train else 0.0
        generation = [self._generation.get((_model(config), task)) for task in config["eval"]["tasks"]]
        if hardware is None or training is None or not (train or any(generation)):
            return None
        return training + sum(statistics.median(seconds) for seconds in generation if seconds), hardware

    def _training_seconds(self, config: dict[str, Any]) -> float | None:
        if same := self._recipes.get(_recipe(config)):
            return statistics.median(same)
        speeds = self._speeds.get((_model(config), config["method"]))
        row_tokens = self._row_tokens.get(_rows(config))
        num_rows = config["data"]["num_rows"]
        if not speeds or not row_tokens or num_rows is None or "max_steps" in config["trainer"]:
            return None
        epochs = config["trainer"].get("num_train_epochs", 3)
        return num_rows * epochs * statistics.median(row_tokens) / statistics.median(speeds)


def _rows(config: dict[str, Any]) -> tuple[str, int]:
    """Return what says how long a row is: the data set (NLU: the task) and where rows are cut."""
    name = config["nlu"]["task"] if "nlu" in config else config["data"]["name"]
    return name, config["data"]["max_length"]


def _model(config: dict[str, Any]) -> str:
    return f"{config['model']['name']} {config['model']['quantization']}"


def _recipe(config: dict[str, Any]) -> str:
    data, trainer = config["data"], config["trainer"]
    parts = [_model(config), config["method"], config["adapter"]["rank"], *_rows(config), data["num_rows"]]
    return str([*parts, *(trainer.get(key) for key in _RECIPE)])


def _disk_lines(specs: Sequence[Spec]) -> list[str]:
    """Return what the runs that are yet to be trained will need: the median size of finished runs of the same kind."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for train_file in (PROJECT_ROOT / "outputs").glob("*/train.json"):
        sizes[_without_seed(train_file.parent.name)].append(_folder_bytes(train_file.parent))
    like = [sizes.get(_without_seed(spec.config.run_id)) for spec in specs]
    needed = sum(statistics.median(found) for found in like if found)
    lines = [f"disk: {shutil.disk_usage(PROJECT_ROOT).free / 1e9:.0f} GB are free"]
    if needed:
        lines[0] += f", about {needed / 1e9:.2g} GB are needed for {sum(map(bool, like))} runs"
    if unknown := like.count(None):
        lines.append(f"disk: not known for {unknown} runs: none like them is there; the head of each base tells")
    return lines


def _without_seed(run_id: str) -> str:
    """Return base, task and method of a run's name."""
    return re.sub(r"-s\d+-[0-9a-f]{10}.*$", "", run_id)


def _folder_bytes(folder: Path) -> int:
    return sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names)
