"""The scores of imbalanced data as an `evaluate` module that needs no network:

    evaluate.load("eval/metrics/per_class.py").compute(
        references=labels, predictions=predictions, classes=["negative", "positive"], minority="positive"
    )

gives {"macro_f1": …, "minority_recall": …, "recall": {"negative": …, "positive": …}, "notes": {…}}; see scores.py.
"""

import datasets
import evaluate

from .scores import class_scores


class PerClass(evaluate.Metric):
    """Recall of each class, macro-F1, and the recall of the minority class."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Recall of each class, macro-F1, recall of the minority class.",
            citation="",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list, references: list, classes: list, minority: str) -> dict:
        scores, recall = class_scores(references, predictions, classes=classes, minority=minority)
        return {**scores.metrics, "recall": recall, "notes": scores.notes}
