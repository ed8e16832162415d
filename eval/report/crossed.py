"""Two rows of a table compared with seeds and items both taken as random: a t-test with crossed random effects.

Each row has its runs, one a seed, and each run a value of every item; what is compared is the difference of the two
means. It would be another one with other seeds and with other items, so its variance has both parts (Clark 1973, the
quasi-F; the docs page statistics.md says why):

    V = s²(a)/S + s²(b)/S + s²(D)/N − (e²(a) + e²(b)) / (S N),      at least s²(D)/N

s²(a): the variance of row a's run means over its S seeds; s²(D): that of the items' differences, each of means over
seeds; e²(a): what is left of row a's values without their seed and item means, which both terms before it contain. The
degrees of freedom are Satterthwaite's, at least S − 1.

With `paired` the runs of one seed are taken together, which is right where the seed moves the same in both rows:

    V = s²(d)/S + s²(D)/N − e²(d) / (S N),      d: the differences of the runs with one seed

A sum over several test sets has the items' parts of each, and the variance over seeds of the whole sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
_NUMBERS_AT_ONCE = 1_000_000  # counts of the sets that leave one item out
_ROUNDING = 1e-12  # a standard error below this share of the values is none


@dataclass(frozen=True)
class Estimate:
    """A difference of two rows with its 95 % confidence interval, and the two-sided p-value of "no difference".

    low, high, p: None where nothing varies; num_items: None where only the seeds count, since the items' values are not
    known.
    """

    difference: float
    error: float
    df: float
    low: float | None
    high: float | None
    p: float | None
    num_items: int | None


def crossed_t(sets: Sequence[tuple[Array, Array]], *, paired: bool = False) -> Estimate:
    """Test the sum over test sets of mean(ours) − mean(theirs); ours [S, N], theirs [S', N]: runs × items of one set.

    Every set has the same seeds in the same order. At least two seeds a row and two items a set are needed.
    """
    ours, theirs = (sum(one.mean(axis=1) for one in side) for side in zip(*sets, strict=True))
    terms = _over_seeds(ours, theirs, paired=paired)
    over_items = 0.0
    for a_SN, b_SN in sets:
        num_items = a_SN.shape[1]
        difference_N = a_SN.mean(axis=0) - b_SN.mean(axis=0)
        over_items += difference_N.var(ddof=1) / num_items
        terms.append((difference_N.var(ddof=1) / num_items, num_items - 1))
        for values_SN in [a_SN - b_SN] if paired else [a_SN, b_SN]:
            num_seeds = len(values_SN)
            df = (num_seeds - 1) * (num_items - 1)
            terms.append((-_interaction(values_SN) / df / (num_seeds * num_items), df))
    scale = max(float(np.abs(one).max()) for pair in sets for one in pair)
    num_items = sum(a_SN.shape[1] for a_SN, _ in sets)
    return _estimate(ours, theirs, terms, least=over_items, scale=scale, num_items=num_items)


def seeds_t(ours: Array, theirs: Array, *, paired: bool = False) -> Estimate:
    """Return the same of run values only (Welch's t, or the paired one): it says nothing of other items."""
    terms = _over_seeds(ours, theirs, paired=paired)
    scale = float(max(np.abs(ours).max(), np.abs(theirs).max()))
    return _estimate(ours, theirs, terms, least=0.0, scale=scale, num_items=None)


def _over_seeds(ours: Array, theirs: Array, *, paired: bool) -> list[tuple[float, int]]:
    """Return (variance, degrees of freedom) of what the seeds add."""
    if min(len(ours), len(theirs)) < 2 or (paired and len(ours) != len(theirs)):
        raise ValueError("a spread over seeds needs two seeds at least, and pairs need a partner each")
    samples = [ours - theirs] if paired else [ours, theirs]
    return [(values.var(ddof=1) / len(values), len(values) - 1) for values in samples]


def _interaction(values_SN: Array) -> float:
    """Return the sum of squares that is left without the means of seeds and of items."""
    rest = values_SN - values_SN.mean(axis=0) - values_SN.mean(axis=1, keepdims=True) + values_SN.mean()
    return float((rest**2).sum())


def _estimate(
    ours: Array, theirs: Array, terms: Sequence[tuple[float, float]], *, least: float, scale: float,
    num_items: int | None,
) -> Estimate:  # fmt: skip
    from scipy import stats

    difference = float(ours.mean() - theirs.mean())
    variance = max(sum(term for term, _ in terms), least)
    error = float(np.sqrt(variance)) if variance > (_ROUNDING * scale) ** 2 else 0.0
    spread = sum(term**2 / df for term, df in terms if term)
    df = max(variance**2 / spread if spread else 0.0, min(len(ours), len(theirs)) - 1)
    if not error:
        return Estimate(difference, 0.0, float(df), None, None, None, num_items)
    half = float(stats.t.ppf(0.975, df)) * error
    p = float(2 * stats.t.sf(abs(difference) / error, df))
    return Estimate(difference, error, float(df), difference - half, difference + half, p, num_items)


def pseudo_values(metric: Callable[[Array, Array, Array], Array], labels_N: Array, values_N: Array) -> Array | None:
    """Return the jackknife's pseudo-values [N] of a metric that is no mean over items, their mean being it.

    Item i's is N θ − (N − 1) θ₍₋ᵢ₎ (Efron & Tibshirani 1993, chapter 11): they stand for the grades of a mean. metric:
    how often each item is there in R sets, [R, K], labels and values [K] → its value on each set, NaN where undefined.
    None where the metric is undefined on all items, or without one of them.
    """
    kinds, first_K, of_item_N, counts_K = np.unique(
        np.stack([labels_N, values_N], axis=1), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    num_items, num_kinds = values_N.size, len(kinds)
    at_once = max(1, _NUMBERS_AT_ONCE // num_kinds)
    labels_K, values_K = labels_N[first_K], values_N[first_K]
    without = []
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        whole = metric(counts_K[None].astype(np.float64), labels_K, values_K)[0]
        for start in range(0, num_kinds, at_once):
            left_out = np.arange(start, min(start + at_once, num_kinds))
            counts_RK = np.repeat(counts_K[None].astype(np.float64), left_out.size, axis=0)
            counts_RK[np.arange(left_out.size), left_out] -= 1
            without.append(metric(counts_RK, labels_K, values_K))
    pseudo_N = (num_items * whole - (num_items - 1) * np.concatenate(without))[of_item_N.ravel()]
    if not np.isfinite(pseudo_N).all():
        return None
    return pseudo_N - pseudo_N.mean() + whole
