"""The score of a classifier's predictions on one set: GLUE's metrics with intervals, and the recall of each class.

    {"task", "version", "of_task", "n", "invalid", "metrics", "interval_95", "notes", "per_class"}

is what scores/<set>.json holds at least. Metrics are fractions, None where undefined, and `notes` says why; interval_95
is a bootstrap over rows. `invalid` counts predictions that are NaN or infinite: one leaves every metric undefined.
nll (not of a regression): the mean negative log-likelihood of the labels, in nats.
per_class (not of a regression): rows and recall of each class, macro_f1, and the recall of the minority class, which is
the rarest of the training set. Runs on a training set of chosen shares have the last two among their metrics.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.glue import NLUTask, find_task
from ba_lora.io import read_jsonl
from eval.metrics import intervals
from eval.tasks.glue import VERSION

CLASS_METRICS = ("macro_f1", "minority_recall")  # those of eval/metrics/per_class.py


def score_predictions(
    lines: Sequence[Mapping[str, Any]],
    *,
    name: str,
    of_task: str | Mapping[str, Any],
    training_counts: Mapping[str, int] | None = None,
    imbalanced: bool = False,
) -> dict[str, Any]:
    """Return the score of the set called `name`, for a model of the task `of_task` (as `find_task` takes it).

    lines: predictions as ba_lora.models.predict.prediction_lines makes them. training_counts: class → rows it had in
    training; None where that is not known: then the minority is the rarest class of the lines. imbalanced: the training
    set had chosen class shares.
    """
    task = find_task(of_task)
    invalid = [line["task_id"] for line in lines if line["prediction"] is None]
    score = {"task": name, "version": VERSION, "of_task": task.name, "n": len(lines), "invalid": len(invalid)}
    score |= {"definition": task.definition} if task.is_own else {}
    if invalid:
        note = (
            f"undefined: {len(invalid)} of {len(lines)} predictions are NaN or infinite, the first for {invalid[0]}: "
            "the training has diverged; lower the learning rate"
        )
        names = [*task.metrics, *(CLASS_METRICS if imbalanced else ())]
        undefined = dict.fromkeys(names)
        return score | {"metrics": undefined, "interval_95": undefined, "notes": dict.fromkeys(names, note)}
    labels, predictions = (np.array([line[key] for line in lines]) for key in ("label", "prediction"))
    from eval.metrics.glue import Glue  # here: `evaluate` takes a second to import
    from eval.metrics.per_class import PerClass

    module = Glue("regression" if task.is_regression else "classification", keep_in_memory=True)
    metrics = module.compute(references=labels, predictions=predictions, metrics=task.metrics)
    notes = metrics.pop("notes")
    if task.is_regression:
        spread = intervals(task.metrics, labels, predictions)
        return score | {"metrics": metrics, "interval_95": spread, "notes": notes}
    support = {label: int((labels == index).sum()) for index, label in enumerate(task.labels)}
    minority = _rarest(task, training_counts or support)
    module = PerClass(keep_in_memory=True)
    by_class = module.compute(references=labels, predictions=predictions, classes=task.labels, minority=minority)
    recall, notes_of_classes = by_class.pop("recall"), by_class.pop("notes")
    metrics |= by_class if imbalanced else {}
    return score | {
        "metrics": metrics,
        "interval_95": intervals(list(metrics), labels, predictions, minority=task.labels.index(minority)),
        "notes": notes | notes_of_classes,
        "nll": _nll(labels, np.array([line["logits"] for line in lines], dtype=float)),
        "per_class": {"n": support, "recall": recall, "minority": minority, **by_class},
    }


def _nll(labels: np.ndarray, logits: np.ndarray) -> float:
    """Return the mean of −log softmax(logits)[label] over the rows; labels [N], logits [N, D]."""
    from scipy.special import log_softmax

    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def _rarest(task: NLUTask, counts: Mapping[str, int]) -> str:
    return min(task.labels, key=lambda label: counts[label])


def dev_scores(run_path: Path, config: NLUConfig, data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return dev set → score of what the kept epoch's model predicted in training (predictions/best.jsonl).

    data: the report of data.nlu.load_nlu_data, as train.json holds it.
    """
    lines = read_jsonl(run_path / "predictions" / "best.jsonl")
    return {
        name: score_predictions(
            [line for line in lines if line["task_id"].startswith(f"{name}/")],
            name=name,
            of_task=config.nlu.task,
            training_counts=data["classes"],
            imbalanced=config.data.is_imbalanced,
        )
        | {"data_sha256": origin.get("data_sha256", origin["sha256"])}  # older runs kept a file's hash only
        for name, origin in data["dev"].items()
    }
