"""The report's statistics against scipy and statsmodels, and on cases that are known by hand."""

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from ba_lora import tables
from ba_lora.tables import available_tables, find_table, load_table
from eval.report.comparisons import planned_comparisons
from eval.report.spec import table_spec
from eval.report.stats import (
    LEAST_RESAMPLES,
    SIGNIFICANT,
    Interval,
    Sample,
    first_and_second,
    holm,
    mean_std,
    paired_bootstrap,
    resamples_for,
)


def of_differences(differences) -> Interval:
    """Return the test of paired differences, one an item."""
    kinds, counts = np.unique(differences, return_counts=True)
    return paired_bootstrap([Sample(counts, lambda drawn: drawn @ kinds / drawn.sum(axis=1))])


def test_mean_and_deviation_by_hand():
    assert mean_std([30.0, 30.0, 40.0]) == pytest.approx((33.3333333, 5.7735027))  # √((2 · 3.33² + 6.67²) / 2)
    assert mean_std([7.0]) == (7.0, None)


def test_deviation_is_scipys_with_n_minus_1():
    values = np.random.default_rng(3).normal(size=7)
    assert mean_std(values) == pytest.approx((values.mean(), scipy.stats.tstd(values)))


@pytest.mark.parametrize("num_tests", [1, 2, 9, 40])
def test_holm_is_statsmodels(num_tests):
    p = np.random.default_rng(num_tests).beta(0.3, 2, size=num_tests)
    p[-1] = p[0]  # ties
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 · 0.01; 2 · 0.03; max(0.06, 1 · 0.04)
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_in_every_table_a_test_can_be_significant(monkeypatch):
    """Were every comparison tested and every p the least that the bootstrap gives, Holm would leave them below 5 %."""
    counts = {}
    monkeypatch.setattr(tables, "_row_cells", lambda *words: [])  # rows and columns alone: runs take long to resolve
    for name in available_tables():
        spec = table_spec(load_table(find_table(name)))
        counts[name] = len(planned_comparisons(spec, spec.rows))
        least = 2 / (resamples_for(counts[name]) + 1)
        assert all(p < SIGNIFICANT for p in holm([least] * counts[name])), (name, counts[name])
    assert counts["nlu_main"] == 336  # more than 250, where 10,000 resamples no longer do
    assert resamples_for(6) == LEAST_RESAMPLES


def test_bootstrap_of_a_constant_difference():
    test = of_differences([1 / 3] * 10)
    assert (test.difference, test.low, test.high) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert test.p == pytest.approx(2 / (LEAST_RESAMPLES + 1))
    assert of_differences([0.0] * 10).p == 1.0


def test_bootstrap_of_two_items_is_the_binomial():
    """Of {−1, 1}, two drawn: the mean is −1, 0, 1 with ¼, ½, ¼; so P(d* ≤ 0) = ¾ either way, and p = 1."""
    test = of_differences([-1.0, 1.0])
    assert (test.low, test.high, test.p) == (-1.0, 1.0, 1.0)


def test_p_is_twice_the_binomial_tail():
    """Of n = 12 items, 3 with −1 and 9 with +1: d* ≤ 0 where at most 6 of 12 draws are +1, Binomial(12, ¾)."""
    test = of_differences([-1.0] * 3 + [1.0] * 9)
    wanted = 2 * scipy.stats.binom.cdf(6, 12, 0.75)
    assert test.p == pytest.approx(wanted, abs=4 * np.sqrt(wanted / 2 / LEAST_RESAMPLES) * 2)


def test_interval_is_near_the_normal_one_and_its_p_near_the_t_test():
    differences = np.random.default_rng(0).normal(0.05, 0.5, size=1319)
    test = of_differences(differences)
    half = 1.96 * differences.std() / np.sqrt(1319)
    assert (test.low, test.high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=2e-3)
    assert test.p == pytest.approx(scipy.stats.ttest_1samp(differences, 0).pvalue, abs=0.01)


def test_interval_covers_the_truth_as_often_as_it_says():
    """95 % of 200 samples, give or take four standard errors of that share."""
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        test = of_differences(random.binomial(1, 0.6, 100) - random.binomial(1, 0.5, 100))
        inside += test.low <= 0.1 <= test.high
    assert abs(inside / 200 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 200)


@pytest.mark.parametrize("num_values", [3, 400])
def test_bootstrap_is_scipys(num_values):
    """Kinds are drawn as often as items would be; both ways of drawing, few kinds and one an item."""
    random = np.random.default_rng(5)
    differences = random.integers(-1, 2, 400) if num_values == 3 else random.normal(0.05, 1, 400)
    test = of_differences(differences)
    wanted = scipy.stats.bootstrap(
        (differences,), np.mean, n_resamples=LEAST_RESAMPLES, method="percentile", rng=random
    )
    error = differences.std() / 20
    assert (test.low, test.high) == pytest.approx(wanted.confidence_interval, abs=0.08 * error)  # ± 3 of a quantile's
    assert test.num_items == 400 and test.difference == pytest.approx(differences.mean())
    drawn = wanted.bootstrap_distribution
    assert test.p == pytest.approx(min(1, 2 * min(np.mean(drawn <= 0), np.mean(drawn >= 0))), abs=0.03)


def test_independent_samples_add_their_variances():
    random = np.random.default_rng(6)
    first, second = random.normal(0, 1, 300), random.normal(0, 3, 200)
    test = paired_bootstrap(
        [Sample(np.ones(len(x), int), lambda drawn, x=x: drawn @ x / len(x)) for x in (first, second)]
    )
    assert test.difference == pytest.approx(first.mean() + second.mean()) and test.num_items == 500
    wanted = 2 * 1.96 * np.sqrt(first.var() / 300 + second.var() / 200)
    assert test.high - test.low == pytest.approx(wanted, rel=0.05)


def test_undefined_draws_are_left_out_and_counted():
    """Of two items, one of a kind without which the value is undefined: a quarter of the draws has none of it."""
    test = paired_bootstrap([Sample(np.array([1, 1]), lambda drawn: np.where(drawn[:, 0] > 0, 1.0, np.nan))])
    assert test.num_undefined == pytest.approx(LEAST_RESAMPLES / 4, rel=0.1)
    assert (test.low, test.high, test.p) == (1.0, 1.0, 2 / (LEAST_RESAMPLES - test.num_undefined + 1))
    assert paired_bootstrap([Sample(np.array([1, 1]), lambda drawn: np.full(len(drawn), np.nan))]) is None


def test_same_grades_same_numbers_and_too_few_items():
    differences = np.random.default_rng(2).normal(size=50)
    assert of_differences(differences) == of_differences(differences.copy())
    with pytest.raises(ValueError, match="two items"):
        of_differences([1.0])


@pytest.mark.parametrize(
    ("values", "better", "wanted"),
    [
        ([1.0, 3.0, 2.0], "higher", ([1], [2])),
        ([1.0, 3.0, 2.0], "lower", ([0], [2])),
        ([3.0, 3.0, 2.0], "higher", ([0, 1], [])),  # shared best: no second
        ([3.001, 3.002, 2.0], "higher", ([0, 1], [])),  # alike as they are shown
        ([3.0, 2.0, 2.0], "higher", ([0], [1, 2])),
        ([3.0, 3.0], "higher", ([], [])),  # all alike: nothing is best
        ([3.0], "higher", ([], [])),
        ([], "higher", ([], [])),
    ],
)
def test_best_and_second(values, better, wanted):
    assert first_and_second(values, better=better, decimals=2) == wanted
