"""The statistics of a table. The libraries do the work; here is what they are asked.

Seeds and items are two sources of noise. The spread over seeds is the standard deviation beside a mean; the paired
bootstrap over items says how far a difference between two rows would move on another sample of test items, with the
very same trained models. Neither contains the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

NUM_RESAMPLES = 10_000
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean difference over items, its 95 % interval, and the two-sided p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p: float


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation with n − 1; None for the latter with one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_bootstrap(differences: Sequence[float]) -> Interval:
    """Test the mean of paired differences, one an item, by resampling items (Efron & Tibshirani, chapters 13 and 15).

    The interval is the percentile interval, 2.5 % to 97.5 %, of the mean over items drawn with replacement. p is the
    level at which that interval would just reach 0: p = 2 · (1 + min(#{d* ≤ 0}, #{d* ≥ 0})) / (B + 1), at most 1, so it
    is never below 2 / (B + 1). The draws are seeded: the same grades give the same numbers.
    """
    sample = np.asarray(differences, dtype=np.float64)
    if len(sample) < 2:
        raise ValueError("a bootstrap over items needs two items at least")
    done = bootstrap(
        (sample,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        method="percentile",
        vectorized=True,
        batch=max(1, 4_000_000 // len(sample)),
        rng=np.random.default_rng(0),
    )
    drawn, rounding = done.bootstrap_distribution, 1e-12
    smaller = min(np.sum(drawn <= rounding), np.sum(drawn >= -rounding))
    p = min(1.0, 2 * (1 + int(smaller)) / (NUM_RESAMPLES + 1))
    return Interval(float(sample.mean()), float(done.confidence_interval.low), float(done.confidence_interval.high), p)


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
