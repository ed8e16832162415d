"""The statistics of a table: mean and spread, corrections for many tests, best and second. The test: crossed.py."""

from collections.abc import Sequence

import numpy as np

SIGNIFICANT = 0.05
LEAST_SEEDS = 5  # of each row, for a test; fewer give an interval only
MOST_PRIMARY = 5  # tests of a primary family


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation with n − 1; None for the latter with one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean over seeds (t); of one value only that value."""
    mean, std = mean_std(values)
    if std is None:
        return mean, mean
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(values) - 1)) * std / float(np.sqrt(len(values)))
    return mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979), in order.

    The i-th smallest of m becomes the largest of (m − j + 1) p_(j) over j ≤ i, at most 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]), 1.0)
    adjusted = np.empty_like(p)
    adjusted[order] = stepped
    return adjusted.tolist()


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted to the false discovery rate (Benjamini & Hochberg 1995), in order."""
    from scipy import stats

    return stats.false_discovery_control(p_values, method="bh").tolist() if len(p_values) else []


def first_and_second(values: Sequence[float], *, better: str, decimals: int) -> tuple[list[int], list[int]]:
    """Return the indices of the best values and of the second best, as they are shown, at `decimals` places.

    Values that are shown alike share their place; where the best is shared there is no second. Where all are alike
    there is no best.
    """
    shown = [round(value, decimals) for value in values]
    places = sorted(set(shown), reverse=better == "higher")
    if len(places) < 2:
        return [], []
    best = [index for index, value in enumerate(shown) if value == places[0]]
    if len(best) > 1:
        return best, []
    return best, [index for index, value in enumerate(shown) if value == places[1]]
