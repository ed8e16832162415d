"""Bootstrap intervals of the metrics: scores.py's definitions, for thousands of resamples at once.

A resample is told by how often each item was drawn, counts_RN (R resamples of N items, or kinds of items): class
metrics follow from the weighted confusion matrix, correlations from weighted moments, Spearman's ranks from weighted
cumulative counts. Each function gives scores.py's value of the resampled items (tests/eval/test_metrics_nlu.py), NaN
where that is undefined: such a resample is left out of the interval.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from eval.tasks.base import bootstrap

Array = np.ndarray
Metric = Callable[[Array, Array, Array], Array]  # counts_RN, labels_N, predictions_N → [R]
_ROUNDING = 1e-12  # a variance below this share of the mean square is none


def weighted_metric(name: str, *, classes: Sequence[str], minority: str | None) -> Metric | None:
    """Return a metric of a score (eval/nlu_scores.py) as a function of counts; None for a name that is none.

    name: one of scores.METRICS, macro_f1, minority_recall, or recall.<class>, the last three also after "per_class.".
    """
    name = name.removeprefix("per_class.")
    of = minority if name == "minority_recall" else name.removeprefix("recall.")
    if name.startswith("recall.") or name == "minority_recall":
        return functools.partial(_recall, of=classes.index(of)) if of in classes else None
    return WEIGHTED.get(name)


def intervals(
    names: Sequence[str], labels: Sequence[float], predictions: Sequence[float], *, minority: int | None = None
) -> dict[str, list[float] | None]:
    """Return metric → [low, high], the percentile bootstrap 95 % interval over items; None where undefined.

    names: those of scores.METRICS, macro_f1, and minority_recall, which takes the class id `minority`.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    metrics: dict[str, Metric] = {**WEIGHTED, "minority_recall": functools.partial(_recall, of=minority)}

    def statistic(counts_RN: Array) -> Array:
        return np.stack([metrics[name](counts_RN, labels, predictions) for name in names], axis=1)

    return dict(zip(names, bootstrap(labels.size, statistic), strict=True))


def _confusion(counts_RN: Array, labels_N: Array, predictions_N: Array) -> Array:
    """Return the weighted confusion matrix [R, K, K], label first."""
    size = int(max(labels_N.max(), predictions_N.max(), 1)) + 1
    cells = np.zeros((labels_N.size, size * size))
    cells[np.arange(labels_N.size), labels_N * size + predictions_N] = 1
    return (counts_RN @ cells).reshape(-1, size, size)


def _accuracy(counts_RN: Array, labels_N: Array, predictions_N: Array) -> Array:
    return counts_RN @ (labels_N == predictions_N) / counts_RN.sum(axis=1)


def _f1_by_class(confusion_RKK: Array) -> Array:
    """Return F1 = 2 TP / (2 TP + FP + FN) of each class [R, K]; NaN for a class that does not occur."""
    hits = np.einsum("rkk->rk", confusion_RKK)
    return 2 * hits / (confusion_RKK.sum(axis=1) + confusion_RKK.sum(axis=2))


def _f1(counts_RN: Array, labels_N: Array, predictions_N: Array) -> Array:
    return _f1_by_class(_confusion(counts_RN, labels_N, predictions_N))[:, 1]


def _macro_f1(counts_RN: Array, labels_N: Array, predictions_N: Array) -> Array:
    return np.nanmean(_f1_by_class(_confusion(counts_RN, labels_N, predictions_N)), axis=1)


def _recall(counts_RN: Array, labels_N: Array, predictions_N: Array, *, of: int) -> Array:
    is_class = labels_N == of
    return counts_RN @ (is_class & (predictions_N == of)) / (counts_RN @ is_class)


def _matthews(counts_RN: Array, labels_N: Array, predictions_N: Array) -> Array:
    """R_K of Gorodkin 2004: Matthews' coefficient for any number of classes."""
    confusion = _confusion(counts_RN, labels_N, predictions_N)
    total, hits = counts_RN.sum(axis=1), np.einsum("rkk->r", confusion)
    of_label, of_prediction = confusion.sum(axis=2), confusion.sum(axis=1)
    spread_label = total**2 - (of_label**2).sum(axis=1)
    spread_prediction = total**2 - (of_prediction**2).sum(axis=1)
    covariance = hits * total - (of_label * of_prediction).sum(axis=1)
    value = covariance / np.sqrt(spread_label * spread_prediction)
    return np.where((spread_prediction == 0) & (spread_label > 0), 0.0, value)  # the convention of scores.py


def _pearson(counts_RN: Array, labels_N: Array, predictions_N: Array) -> Array:
    x, y = labels_N - labels_N.mean(), predictions_N - predictions_N.mean()  # near 0, the moments keep their digits
    sums_RM = counts_RN @ np.stack([x, y, x * y, x * x, y * y], axis=1) / counts_RN.sum(axis=1, keepdims=True)
    mean_x, mean_y, xy, xx, yy = sums_RM.T
    variance_x, variance_y = xx - mean_x**2, yy - mean_y**2
    constant = (variance_x <= _ROUNDING * xx) | (variance_y <= _ROUNDING * yy)
    return np.where(constant, np.nan, (xy - mean_x * mean_y) / np.sqrt(variance_x * variance_y))


def _ranks(counts_RN: Array, values_N: Array) -> tuple[Array, Array, Array]:
    """Return the mid-rank of each different value less the mean rank, [R, G], how often it was drawn, [R, G], and the
    number from 0 of each item's value, [N]. Equal values share the mean of the places they take."""
    _, group_N = np.unique(values_N, return_inverse=True)
    order = np.argsort(group_N, kind="stable")
    sizes_RG = counts_RN[:, order]
    if group_N.max() + 1 < group_N.size:
        sizes_RG = np.add.reduceat(sizes_RG, np.flatnonzero(np.diff(group_N[order], prepend=-1)), axis=1)
    places_RG = np.cumsum(sizes_RG, axis=1)
    places_RG -= sizes_RG / 2 + places_RG[:, -1:] / 2  # rank − mean rank = place − (size − 1) / 2 − (total + 1) / 2
    return places_RG, sizes_RG, group_N


def _spearman(counts_RN: Array, labels_N: Array, predictions_N: Array) -> Array:
    """Pearson's coefficient of the mid-ranks."""
    (x_RG, sizes_x, of_x), (y_RG, sizes_y, of_y) = (_ranks(counts_RN, values) for values in (labels_N, predictions_N))
    covariance = np.einsum("rn,rn,rn->r", counts_RN, x_RG[:, of_x], y_RG[:, of_y])
    variances = (np.einsum("rg,rg,rg->r", sizes, x, x) for sizes, x in ((sizes_x, x_RG), (sizes_y, y_RG)))
    return covariance / np.sqrt(np.prod(list(variances), axis=0))


WEIGHTED: Mapping[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
