"""The metrics, by scikit-learn and scipy, and notes on what these do not say.

A metric that the data leave undefined is None, with the reason beside it, and never 0 or NaN: Matthews where all labels
are of one class, a correlation where labels or predictions are constant, the recall of a class without rows. Where a
convention gives a number all the same (Matthews is 0 when a model predicts one class only), a note says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ba_lora.errors import UserError

POSITIVE = 1  # the class that F1 is about: `equivalent` (MRPC), `duplicate` (QQP)


@dataclass(frozen=True)
class Scores:
    """Metrics as fractions (correlations from −1 to 1), None where undefined; and why, or what else to know."""

    metrics: dict[str, float | None]
    notes: dict[str, str] = field(default_factory=dict)


def glue_scores(names: Sequence[str], labels: Sequence[float], predictions: Sequence[float]) -> Scores:
    """Return the named metrics of predictions: class ids, or numbers for pearson and spearman.

    names: of accuracy, f1 (binary, of class 1), macro_f1 (over the classes that occur), matthews, pearson, spearman.
    Raises UserError for predictions that are NaN or infinite, for numbers of labels and predictions that differ, and
    for none at all.
    """
    labels, predictions = checked(labels, predictions)
    values, notes = {}, {}
    for name in names:
        values[name], note = METRICS[name](labels, predictions)
        if note:
            notes[name] = note
    return Scores(values, notes)


def class_scores(
    labels: Sequence[int], predictions: Sequence[int], *, classes: Sequence[str], minority: str
) -> tuple[Scores, dict[str, float | None]]:
    """Return macro-F1 and the recall of the class `minority` as scores, and the recall of every class.

    Macro-F1 is the mean over the classes that occur in labels or predictions (scikit-learn's default).
    """
    from sklearn.metrics import recall_score

    labels, predictions = checked(labels, predictions)
    found = recall_score(labels, predictions, labels=range(len(classes)), average=None, zero_division=np.nan)
    recall = {name: None if np.isnan(value) else float(value) for name, value in zip(classes, found, strict=True)}
    macro_f1, _ = _macro_f1(labels, predictions)
    notes = {} if recall[minority] is not None else {"minority_recall": f"no row is of class {minority}"}
    return Scores({"macro_f1": macro_f1, "minority_recall": recall[minority]}, notes), recall


def checked(labels: Sequence[float], predictions: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays [N] once they can be compared; see `glue_scores` for what is refused."""
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1:
        raise UserError(f"{labels.size} labels and {predictions.size} predictions: there must be one for each row")
    if not labels.size:
        raise UserError("no rows: there is nothing to score")
    bad = ~np.isfinite(predictions)
    if bad.any():
        raise UserError(
            f"{bad.sum()} of {bad.size} predictions are NaN or infinite, the first in row {int(bad.argmax())}: the "
            "training has diverged; lower the learning rate"
        )
    return labels, predictions


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> tuple[float | None, str | None]:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions)), None


def _f1(labels: np.ndarray, predictions: np.ndarray) -> tuple[float | None, str | None]:
    from sklearn.metrics import f1_score

    value = float(f1_score(labels, predictions, pos_label=POSITIVE, zero_division=np.nan))
    return (None, "undefined: no row is positive, and none is predicted to be") if np.isnan(value) else (value, None)


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> tuple[float | None, str | None]:
    from sklearn.metrics import matthews_corrcoef

    if len(set(labels.tolist())) == 1:
        return None, f"undefined: all {labels.size} labels are of class {labels[0]}"
    note = (
        f"0 by convention: every prediction is class {predictions[0]}" if len(set(predictions.tolist())) == 1 else None
    )
    return float(matthews_corrcoef(labels, predictions)), note


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], tuple[float | None, str | None]]:
    def correlation(labels: np.ndarray, predictions: np.ndarray) -> tuple[float | None, str | None]:
        from scipy import stats

        if labels.size < 2:
            return None, "undefined: a correlation needs at least two rows"
        for what, values in (("labels", labels), ("predictions", predictions)):
            if (values == values[0]).all():
                return None, f"undefined: all {values.size} {what} are {values[0]:g}"
        return float(getattr(stats, name)(labels, predictions).statistic), None

    return correlation


def _macro_f1(labels: np.ndarray, predictions: np.ndarray) -> tuple[float | None, str | None]:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=np.nan)), None


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], tuple[float | None, str | None]]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}
