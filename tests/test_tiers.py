"""The slow tier's turns: each day begins at another place, so that a week's first shares are the whole."""

import datetime

import pytest

from tests.conftest import DAYS, todays_order
from tests.support.tiers import mostly_slow


@pytest.mark.parametrize("number", [1, 6, 7, 100])
def test_the_first_shares_of_a_week_are_all_tests(number):
    items = list(range(number))
    day = datetime.date.fromordinal(7 * 105_000)
    orders = [todays_order(items, day + datetime.timedelta(days=later)) for later in range(DAYS)]
    assert all(sorted(order) == items for order in orders)
    share = -(-number // DAYS) + 1  # rounded up; places are rounded too
    assert {item for order in orders for item in order[:share]} == set(items)


def test_only_named_cases_are_quick():
    cases = mostly_slow(["a", "b"], ("b",))
    assert [(case.id, [mark.name for mark in case.marks]) for case in cases] == [("a", ["slow"]), ("b", [])]
    with pytest.raises(ValueError, match="no such case: c"):
        mostly_slow(["a"], ("c",))
