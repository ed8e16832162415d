"""The statistics of a table: mean and spread, the paired bootstrap, Holm's correction, best and second.

All of it is a few lines on numpy; scipy's bootstrap and statsmodels' Holm, which take no part here, are what the tests
compare it with.

Seeds and items are two sources of noise. The spread over seeds is the standard deviation beside a mean; the paired
bootstrap over items says how far a difference between two rows would move on another sample of test items, with the
very same trained models. Neither contains the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_RESAMPLES = 10_000
RESAMPLES_A_TEST = 100
SIGNIFICANT = 0.05
_NUMBERS_AT_ONCE = 200_000  # counts that stay in a core's cache while a metric goes over them, several times faster
_ROUNDING = 1e-12  # a difference below it is none

Array = np.ndarray


@dataclass(frozen=True)
class Interval:
    """A difference of two rows, its 95 % interval over items, and the two-sided p-value of "no difference".

    num_undefined: of the resamples, those that leave the difference undefined.
    """

    difference: float
    low: float
    high: float
    p: float
    num_items: int
    num_undefined: int = 0


@dataclass(frozen=True)
class Sample:
    """Test items that two rows have in common, by kind: on items of one kind all that is compared is the same.

    counts_K: items of each kind. difference: such counts of R resamples, [R, K] → the difference of the two rows in
    each, [R], NaN where it is undefined.
    """

    counts_K: Array
    difference: Callable[[Array], Array]

    @property
    def num_items(self) -> int:
        return int(self.counts_K.sum())


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation with n − 1; None for the latter with one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def resamples_for(num_tests: int) -> int:
    """Return how many resamples each of a table's tests takes: enough for one to remain significant once corrected.

    No p-value is below 2 / (B + 1), and Holm multiplies the smallest by the number of tests. With 100 resamples a test
    (10,000 at least) the least corrected p is below 2 / 100, whatever the size of the table.
    """
    return max(LEAST_RESAMPLES, RESAMPLES_A_TEST * num_tests)


def paired_bootstrap(samples: Sequence[Sample], *, num_resamples: int = LEAST_RESAMPLES) -> Interval | None:
    """Test the sum of the samples' differences by resampling items (Efron & Tibshirani, chapters 13 and 15).

    Each resample draws as many items of every sample as it has, with replacement; one sample's draws do not depend on
    another's, and both rows are measured on the same draw. The interval is the percentile interval, 2.5 % to 97.5 %. p
    is the level at which that interval would just reach 0: p = 2 · (1 + min(#{d* ≤ 0}, #{d* ≥ 0})) / (B + 1), at most
    1, so it is never below 2 / (B + 1). Resamples that leave the difference undefined (all labels of one class, say)
    are left out of both, and counted. The draws are seeded: the same items give the same numbers.

    Returns None where every resample, or the difference itself, is undefined.
    """
    if any(sample.num_items < 2 for sample in samples):
        raise ValueError("a bootstrap over items needs two items at least")
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = sum(sample.difference(sample.counts_K[None].astype(np.float64))[0] for sample in samples)
        drawn = np.zeros(num_resamples)
        for sample, seed in zip(samples, np.random.SeedSequence(0).spawn(len(samples)), strict=True):
            draws = resampled(sample.counts_K, seed, num_resamples)
            drawn += np.concatenate([sample.difference(counts_RK) for counts_RK in draws])
    defined = drawn[~np.isnan(drawn)]
    if not defined.size or np.isnan(difference):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    smaller = min(np.sum(defined <= _ROUNDING), np.sum(defined >= -_ROUNDING))
    return Interval(
        difference=float(difference),
        low=float(low),
        high=float(high),
        p=min(1.0, 2 * (1 + int(smaller)) / (defined.size + 1)),
        num_items=sum(sample.num_items for sample in samples),
        num_undefined=num_resamples - defined.size,
    )


def resampled(counts_K: Array, seed: np.random.SeedSequence, num_resamples: int) -> Iterator[Array]:
    """Yield how many items of each kind `num_resamples` resamples have, [R, K] at a time.

    Drawing N items with replacement draws their kinds from a multinomial distribution. Where most items are of a kind
    of their own, the items themselves are drawn, which is faster.
    """
    random = np.random.default_rng(seed)
    num_kinds, num_items = counts_K.size, int(counts_K.sum())
    by_kind = 8 * num_kinds < num_items
    at_once = max(1, _NUMBERS_AT_ONCE // (num_kinds if by_kind else num_items))
    kind_N = np.repeat(np.arange(num_kinds), counts_K)
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        if by_kind:
            counts_RK = random.multinomial(num_items, counts_K / num_items, size)
        else:
            drawn = kind_N[random.integers(0, num_items, (size, num_items))] + num_kinds * np.arange(size)[:, None]
            counts_RK = np.bincount(drawn.ravel(), minlength=size * num_kinds).reshape(size, num_kinds)
        yield counts_RK.astype(np.float64)


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
