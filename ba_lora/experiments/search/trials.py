"""A trial's trainings: what they are started with, what their evaluations say, and what is kept of them.

A trial trains its parameters' values once for each of `seeds`, the first seed first: where that is pruned, the others
are not trained. Of a known trial the weights are removed; config, log, evaluations and record stay.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ba_lora.config.checks import check_places
from ba_lora.config.schema import RunConfig
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.errors import UserError
from ba_lora.experiments.search.space import SearchSpace
from ba_lora.experiments.spec import Spec
from ba_lora.experiments.stages import check_evaluation, evaluation_stages
from ba_lora.glue import find_task
from ba_lora.io import read_json, read_object
from ba_lora.paths import resolve_path
from ba_lora.rows import load_rows
from ba_lora.runs.folder import EXPORTS
from ba_lora.training.evaluations import STOP, read_evaluations

HELDOUT_TASK = "heldout"
MEASURED_SET, FIRST_MEASURED = "metamathqa", 100_000  # what the task takes without a file: eval/tasks/heldout.py


class TrialRuns:
    """Makes the runs of trials: `config_path`, `method` and `words` as they were typed, then the space's own."""

    def __init__(
        self, space: SearchSpace, folder: Path, config_path: str, *, method: str | None, words: Sequence[str], kind: str
    ) -> None:
        self.space, self.folder, self.kind = space, folder, kind
        self._config_path, self._words = config_path, tuple(words)
        self._method = None if any(parameter.key == "method" for parameter in space.parameters) else method

    def spec(self, number: int, values: Mapping[str, Any], seed: int) -> Spec:
        """Return a trial's training with one seed. Raises UserError where no run may have these values."""
        words = [*self._words, *self.space.overrides]
        if self.space.objective == "heldout_accuracy" and self.kind == "nlg":
            words.append(f"eval.tasks=[{HELDOUT_TASK}]")
        else:
            words += ["eval.tasks=[]", "export.merged=false"]
        words += ["eval.untuned=false"] if self.kind == "nlg" else []
        words += [*self.space.words(values), f"seed={seed}", f"results_dir={self.folder / 'results'}"]
        words.append(f"output_dir={self.run_path(number, seed)}")
        return Spec.resolve(self._config_path, self._method, words, kind=self.kind)

    def run_path(self, number: int, seed: int) -> Path:
        """Return the folder of a trial's training with one seed."""
        return self.folder / "trials" / f"t{number:04}-s{seed}"

    def best_config(self, values: Mapping[str, Any]) -> RunConfig:
        """Return the config to train with these values: without what only a trial is measured by."""
        words = [*self._words, *self.space.words(values), f"seed={self.space.seeds[0]}"]
        return Spec.resolve(self._config_path, self._method, words, kind=self.kind).config

    def check(self, first: Mapping[str, Any]) -> None:
        """Raise UserError where the objective cannot be had from such trainings, or would be that of a test set."""
        spec = self.spec(0, first, self.space.seeds[0])
        check_places(spec.config)
        check_objective(self.space, spec.config)
        if spec.config.eval.tasks and self.kind == "nlg":
            check_evaluation(evaluation_stages([spec.config]))

    def evaluations(self, config: RunConfig) -> list[tuple[int, float, bool]]:
        """Return (step, loss, whether it is the last one that the training will make), in the steps' order. The loss is
        to be minimised: the task's loss on held-out rows, NLU: 1 − its first metric on them; ∞ where it was not
        finite."""
        name = _evaluated(config)
        found = []
        for entry in read_evaluations(config.run_path):
            if name in entry:
                value = math.nan if entry[name] is None else float(entry[name])
                loss = value if config.kind == "nlg" else 1 - value
                is_last = entry["step"] >= entry["max_steps"]
                found.append((entry["step"], loss if math.isfinite(loss) else math.inf, is_last))
        return found

    def loss(self, config: RunConfig) -> float:
        """Return a whole training's value, to be minimised: of the exported checkpoint, the last or the best."""
        if self.space.objective == "heldout_accuracy" and self.kind == "nlg":
            score = read_json(config.run_path / "scores" / f"{HELDOUT_TASK}.json")
            return 1 - score["metrics"]["strict"]
        losses = {step: loss for step, loss, _ in self.evaluations(config)}
        if not losses:
            raise UserError(f"{config.run_path} has no evaluation: its evaluations.jsonl is gone")
        if config.kind == "nlu":
            return min(losses.values())
        training = (read_object(config.run_path / "train.json") or {}).get("training") or {}
        return losses.get(training.get("best_step"), losses[max(losses)])

    def facts(self, config: RunConfig) -> dict[str, Any]:
        """Return what a training cost."""
        training = (read_object(config.run_path / "train.json") or {}).get("training") or {}
        return {key: training.get(key) for key in ("seconds", "steps", "peak_memory_mb", "trainable_parameters")}


def _evaluated(config: RunConfig) -> str:
    if config.kind == "nlg":
        return "eval_task"
    return f"eval_heldout_{find_task(config.nlu.task).metrics[0]}"


def ask_to_stop(run_path: Path) -> None:
    """Have a training end at its next step."""
    if run_path.is_dir():
        (run_path / STOP).touch()


def remove_weights(run_path: Path) -> None:
    """Remove what a trial has trained; its record stays."""
    for name in (*EXPORTS, "checkpoints", "initial", "residual", "epochs"):
        shutil.rmtree(run_path / name, ignore_errors=True)


def check_objective(space: SearchSpace, config: RunConfig) -> None:
    """Raise UserError where the trainings do not give the objective, or where it would look at a test set."""
    if isinstance(config, NLGConfig):
        evaluates = str(config.trainer.get("eval_strategy") or "no") != "no"
        if not evaluates and (space.objective == "heldout_loss" or space.pruning):
            what = "pruning" if space.pruning else "objective heldout_loss"
            raise UserError(
                f"{what} needs held-out rows in the training: add data.heldout_share=0.05 and "
                "trainer.eval_strategy=epoch (or steps, with trainer.eval_steps) to overrides"
            )
        if space.objective == "heldout_accuracy":
            _check_measured_rows(config)
        _refuse_test_rows(space, config)
        return
    if space.objective != "heldout_accuracy":
        raise UserError(
            "objective heldout_loss is for NLG: an NLU run measures heldout_accuracy, its task's first metric"
        )
    if config.nlu.selection != "tuned":
        raise UserError(
            "an NLU search needs nlu.selection=tuned in overrides: else the dev set chooses, which is reported"
        )


def _check_measured_rows(config: NLGConfig) -> None:
    """Raise UserError where the accuracy would be that of another set's rows, or of rows that are trained on."""
    data, file = config.data, config.eval.data.get(HELDOUT_TASK)
    remedy = "give rows that are kept out of training by eval.data.heldout=FILE (columns query and response)"
    if file is None and (data.name != MEASURED_SET or data.source is not None):
        raise UserError(
            f"objective heldout_accuracy would be measured on MetaMathQA, and the trials train on "
            f"{data.source or data.name}: {remedy}"
        )
    if file is None and (data.num_rows is None or data.num_rows > FIRST_MEASURED or data.sample_seed is not None):
        raise UserError(
            f"objective heldout_accuracy would be measured on rows {FIRST_MEASURED} and later of MetaMathQA, which the "
            f"trials may train on: set data.num_rows to at most {FIRST_MEASURED} without data.sample_seed, or {remedy}"
        )
    if file is not None and resolve_path(file) in map(resolve_path, data.sources):
        raise UserError(f"eval.data.heldout={file} is what the trials train on: {remedy}")


def _refuse_test_rows(space: SearchSpace, config: NLGConfig) -> None:
    tests = {task: resolve_path(file) for task, file in config.eval.data.items() if task != HELDOUT_TASK}
    named = config.eval.data.get(HELDOUT_TASK)
    asked = {"eval.data.heldout": named} if space.objective == "heldout_accuracy" else {}
    if config.data.split != "train":
        raise UserError(f"data.split={config.data.split} is refused: a search may look at training rows only")
    for key, file in [*(("data.source", one) for one in config.data.sources), *asked.items()]:
        path = resolve_path(file) if file else None
        if path is None or not path.is_file():
            continue
        own = config.data.columns.get("instruction") if key == "data.source" else None
        rows = _questions(path, own)
        for task, test in tests.items():
            if test.is_file() and (shared := rows & _questions(test)):
                raise UserError(
                    f"{key}={file} shares {len(shared)} questions with {test.name}, the test set of {task}: a search "
                    "never looks at a test set; give other rows"
                )


def _questions(path: Path, own: str | None = None) -> set[str]:
    """Return the questions of a file, without what case and spaces differ in. own: the column that has them, where it
    has none of the usual names."""
    rows, _ = load_rows(str(path), split="train")
    names = ("query", "question", "instruction", "problem", "prompt", "text", *([own] if own else []))
    found = (row[name] for row in rows for name in names if isinstance(row.get(name), str))
    return {" ".join(text.lower().split()) for text in found}
