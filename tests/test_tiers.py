"""The slow tier's turns: each day begins at another place, so that a week's first shares are the whole."""

import datetime
from types import SimpleNamespace

import pytest

from tests.conftest import DAYS, todays_order
from tests.support import tiers
from tests.support.tiers import list_slow_tests, mark_slow_tests, mostly_slow


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


def test_the_longest_tests_are_listed_and_one_case_of_each_stays(tmp_path):
    times = {"a": 9, "b[x]": 3, "b[y]": 7, "b[z]": 8, "c[x]": 12, "c[y]": 13, "d": 5}
    cases = "".join(
        f'<testcase classname="tests.m" name="{name}" time="{seconds}"/>' for name, seconds in times.items()
    )
    kept = '<testcase classname="tests.golden.test_golden" name="e" time="99"/>'
    (tmp_path / "times.xml").write_text(f"<testsuites><testsuite>{cases}{kept}</testsuite></testsuites>")
    found = list_slow_tests(tmp_path / "times.xml", 6)
    assert [name.removeprefix("tests/m.py::") for name in found] == ["a", "b[y]", "b[z]", "c[x]", "c[y]"]


def test_a_listed_test_is_slow_and_one_that_is_gone_is_told(tmp_path, monkeypatch):
    marked = []
    items = [
        SimpleNamespace(nodeid=f"m.py::{name}", add_marker=lambda mark, name=name: marked.append((name, mark.name)))
        for name in ("a", "b")
    ]
    monkeypatch.setattr(tiers, "SLOW_TESTS", tmp_path / "slow.txt")
    tiers.SLOW_TESTS.write_text("m.py::a\ntests/test_tiers.py::a\n")
    mark_slow_tests(items, whole=True)
    assert marked == [("a", "slow")]
    tiers.SLOW_TESTS.write_text("m.py::c\n")
    mark_slow_tests(items, whole=False)
    with pytest.raises(pytest.UsageError, match="no such test: m.py::c"):
        mark_slow_tests(items, whole=True)
