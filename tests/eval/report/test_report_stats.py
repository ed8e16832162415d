"""Mean and spread, corrections, best and second: against scipy and statsmodels, and on cases known by hand."""

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from eval.report.stats import benjamini_hochberg, first_and_second, holm, mean_std


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


@pytest.mark.parametrize("num_tests", [1, 2, 9, 40])
def test_benjamini_hochberg_is_statsmodels(num_tests):
    p = np.random.default_rng(num_tests).beta(0.3, 2, size=num_tests)
    assert benjamini_hochberg(p) == pytest.approx(multipletests(p, method="fdr_bh")[1])
    assert benjamini_hochberg([]) == []


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
