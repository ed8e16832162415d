"""GLUE's metrics as an `evaluate` module that needs no network:

    evaluate.load("eval/metrics/glue.py", "mrpc").compute(references=labels, predictions=predictions)

gives {"accuracy": …, "f1": …, "notes": {…}}; see scores.py for what the notes say and what is None. For any other task
the configuration is `classification` or `regression`, and `compute` is told the names: metrics=["macro_f1"].
"""

from collections.abc import Sequence

import datasets
import evaluate

from ba_lora.glue import TASKS

from .scores import glue_scores

TASK_METRICS = {name: task.metrics for task in TASKS.values() for name in task.dev_sets}
KINDS = ("classification", "regression")


class Glue(evaluate.Metric):
    """The metrics of the task named as the configuration."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in (*TASK_METRICS, *KINDS):
            raise ValueError(f"unknown task {self.config_name!r}: choose one of {', '.join((*TASK_METRICS, *KINDS))}")
        value = datasets.Value("float64" if self.config_name in ("stsb", "regression") else "int64")
        return evaluate.MetricInfo(
            description="The metrics of the GLUE benchmark.",
            citation="Wang et al. 2019, GLUE: A Multi-Task Benchmark and Analysis Platform (ICLR)",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list, references: list, metrics: Sequence[str] | None = None) -> dict:
        scores = glue_scores(metrics or TASK_METRICS[self.config_name], references, predictions)
        return {**scores.metrics, "notes": scores.notes}
