"""Evaluation inside an NLU training: after every epoch, and features for figures at chosen steps.

The epoch whose model is kept is the one with the best first metric (the earliest of equals) on the dev set
(selection=paper) or on a held-out part of the training rows (selection=tuned); the last epoch is reported beside it.

    <run>/epochs/<step>.safetensors   the trained weights of an epoch that may be the best, until training ends
    <run>/epochs/<step>.jsonl         its predictions
    <run>/predictions/{best,last}.jsonl
    <run>/features/step-<step>.safetensors   `features` [N, hidden], `labels` [N]

What was measured stands in the trainer's log, so a resumed run knows the epochs before it.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.errors import UserError
from ba_lora.glue import find_task
from ba_lora.io import file_atomic, load_tensors, read_jsonl, remove_leftovers, write_jsonl_atomic
from ba_lora.models.predict import Predictions, predict, predicted_values, prediction_lines

if TYPE_CHECKING:
    from datasets import Dataset

    from ba_lora.training.trainer import BALoRATrainer

HELDOUT = "heldout"
STATE = "method_state:"  # before the names of what the method keeps beside the trained weights
# (labels, predictions) of one set → metric name → value, None where it is undefined
Scorer = Callable[[list[float], list[float]], dict[str, float | None]]


@dataclass(frozen=True)
class Epoch:
    """One evaluation: after how many epochs and steps, and metrics by set."""

    epoch: float
    step: int
    metrics: dict[str, dict[str, float | None]]


class EpochEvaluation(TrainerCallback):
    """Evaluates, keeps the best epoch's weights and saves features. Add it with `trainer.add_callback`."""

    def __init__(
        self,
        trainer: "BALoRATrainer",
        config: NLUConfig,
        run_path: Path,
        *,
        dev: dict[str, "Dataset"],
        heldout: "Dataset | None",
        scorer: Scorer,
    ) -> None:
        self._trainer = trainer
        self._config = config
        self._run_path = run_path
        self._sets = dev | ({HELDOUT: heldout} if heldout is not None else {})
        self._first_dev = next(iter(dev))
        self._chooser = HELDOUT if heldout is not None else self._first_dev
        self._task = find_task(config.nlu.task)
        self._scorer = scorer

    # ---- what Trainer calls ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and 0 in self._config.features.steps:
            self._save_features(0, self._predict(self._first_dev))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate before Trainer saves this step's checkpoint, so that the checkpoint knows of it."""
        whole_epoch = abs(state.epoch - round(state.epoch)) < 1e-6
        wants_log = control.should_log  # logging the evaluation would clear it
        predictions = None
        if whole_epoch or state.global_step >= state.max_steps:
            predictions = self._evaluate()
        if state.global_step in self._config.features.steps:
            self._save_features(state.global_step, predictions or self._predict(self._first_dev))
        control.should_log = wants_log

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From this checkpoint on, only the best epoch so far can still be asked for."""
        history = self.history()
        if history and self._trainer.is_world_process_zero():
            kept = {str(self.best(history).step), str(history[-1].step)}
            for file in (self._run_path / "epochs").iterdir():
                if file.stem not in kept:
                    file.unlink()

    # ---- the results ----

    def history(self) -> list[Epoch]:
        """Return the evaluations so far, from the trainer's log."""
        found = []
        for entry in self._trainer.state.log_history:
            metrics = {
                name: {
                    metric: None if math.isnan(value) else value
                    for metric in self._task.metrics
                    if (value := entry.get(f"eval_{name}_{metric}")) is not None
                }
                for name in self._sets
            }
            if metrics[self._chooser]:
                found.append(Epoch(round(entry["epoch"], 4), entry["step"], metrics))
        return found

    def best(self, history: list[Epoch]) -> Epoch:
        """Return the epoch that is kept."""
        return max(history, key=self._worth)  # the first of equals

    def finish(self) -> tuple[Epoch, Epoch]:
        """Put the best epoch's weights into the model, write the predictions; return (best, last).

        Every process calls it, once training is over. Raises UserError where even the kept epoch predicts NaN.
        """
        history = self.history()
        if not history or history[-1].step != self._trainer.state.global_step:
            self._evaluate()
            history = self.history()
        best, last = self.best(history), history[-1]
        folder = self._run_path / "epochs"
        self._trainer.accelerator.wait_for_everyone()
        for epoch in (best, last):
            if not (folder / f"{epoch.step}.jsonl").is_file():
                raise UserError(f"{folder} lacks the files of step {epoch.step}: overwrite=true trains again")
        bad = sum(line["prediction"] is None for line in read_jsonl(folder / f"{best.step}.jsonl"))
        if bad:
            raise UserError(
                f"{bad} predictions of the best epoch are NaN or infinite: the training has diverged; lower "
                "trainer.learning_rate"
            )
        if best.step != last.step:
            self._load_weights(folder / f"{best.step}.safetensors")
        self._trainer.accelerator.wait_for_everyone()
        if self._trainer.is_world_process_zero():
            predictions = self._run_path / "predictions"
            predictions.mkdir(exist_ok=True)
            for name, epoch in (("best", best), ("last", last)):
                shutil.copyfile(folder / f"{epoch.step}.jsonl", predictions / f"{name}.jsonl")
        return best, last

    def remove_files(self) -> None:
        """Remove the epochs' weights, once the run is exported. Call it on one process only."""
        shutil.rmtree(self._run_path / "epochs", ignore_errors=True)

    # ---- how ----

    def _predict(self, name: str) -> Predictions:
        trainer = self._trainer
        return predict(
            trainer.model_wrapped if trainer.model_wrapped is not None else trainer.model,
            self._sets[name],
            trainer.data_collator,
            batch_size=trainer.args.per_device_eval_batch_size,
        )

    def _evaluate(self) -> Predictions:
        """Predict and score every set, log it, keep files of an epoch that may be the best; return the first dev set's
        predictions."""
        found = {name: self._predict(name) for name in self._sets}
        logs, lines = self._scored(found)
        self._trainer.log(logs)
        if self._trainer.is_world_process_zero():
            self._keep(lines, bad=logs.get("eval_invalid", 0))
        return found[self._first_dev]

    def _scored(self, found: dict[str, Predictions]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return what is logged of an evaluation, and a line for each dev row."""
        logs, lines, bad = {}, [], 0
        for name, rows in self._sets.items():
            values, invalid = predicted_values(found[name].logits)
            bad += invalid
            metrics = {metric: None for metric in self._task.metrics}
            if not invalid:
                metrics = self._scorer(rows["labels"], values)
            for metric, value in metrics.items():
                logs[f"eval_{name}_{metric}"] = math.nan if value is None else value
            if name != HELDOUT:
                task_ids = [f"{name}/{number}" for number in rows["row"]]
                lines += prediction_lines(task_ids, rows["labels"], found[name].logits)
        if bad:
            logs["eval_invalid"] = bad
        return logs, lines

    def _keep(self, lines: list[dict[str, Any]], *, bad: int) -> None:
        """Write the files of the epoch that was just logged, and print its line."""
        history, step = self.history(), self._trainer.state.global_step
        is_best = self.best(history).step == step
        folder = self._run_path / "epochs"
        folder.mkdir(exist_ok=True)
        write_jsonl_atomic(folder / f"{step}.jsonl", lines)
        if is_best:
            self._save_weights(folder / f"{step}.safetensors")
        print(self._line(history[-1], is_best=is_best, bad=bad), flush=True)

    def _line(self, epoch: Epoch, *, is_best: bool, bad: int) -> str:
        parts = [f"epoch {epoch.epoch:g} (step {epoch.step})"]
        for name, metrics in epoch.metrics.items():
            shown = (f"{k} {'undefined' if v is None else format(v, '.4f')}" for k, v in metrics.items())
            parts.append(f"{name} {', '.join(shown)}")
        if bad:
            parts.append(f"{bad} predictions are NaN or infinite: the training has diverged")
        return " | ".join(parts) + (" | best so far" if is_best else "")

    def _worth(self, epoch: Epoch) -> float:
        value = epoch.metrics[self._chooser].get(self._task.metrics[0])
        return -math.inf if value is None else value

    def _trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _save_weights(self, path: Path) -> None:
        from safetensors.torch import save_file

        weights = {
            name: parameter.detach().cpu().contiguous() for name, parameter in self._trained_parameters().items()
        }
        state = self._trainer.method.tuner.saved_state(self._trainer.accelerator.unwrap_model(self._trainer.model))
        weights |= {f"{STATE}{name}": value for name, value in state.items()}
        remove_leftovers(path)  # of a save that was killed
        with file_atomic(path) as temporary:
            save_file(weights, temporary)

    def _load_weights(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path.parent} lacks the weights of the best epoch: overwrite=true trains again")
        weights = load_tensors(path)
        with torch.no_grad():
            for name, parameter in self._trained_parameters().items():
                parameter.copy_(weights[name])
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        state = {name.removeprefix(STATE): value for name, value in weights.items() if name.startswith(STATE)}
        self._trainer.method.tuner.load_state(model, state)

    def _save_features(self, step: int, predictions: Predictions) -> None:
        if not self._trainer.is_world_process_zero():
            return
        from safetensors.torch import save_file

        number = self._config.features.num_rows
        labels = torch.tensor(self._sets[self._first_dev]["labels"])[:number]
        path = self._run_path / "features" / f"step-{step}.safetensors"
        remove_leftovers(path)
        with file_atomic(path) as temporary:
            save_file({"features": predictions.pooled[:number].contiguous(), "labels": labels}, temporary)
