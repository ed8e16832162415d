"""Which tests the default suite runs; the others are left to the slow tier.

A test is slow by its mark, `@pytest.mark.slow`, or since it stands in slow_tests.txt, made from times measured:

    sh scripts/test.sh --junitxml=times.xml
    python -m tests.support.tiers times.xml SECONDS

lists what takes longer than so many seconds. Of a test with several cases the quickest stays in the default suite as
long as it takes less than one and a half times that; the files of KEPT stay whole.
"""

import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")
ROOT = Path(__file__).resolve().parents[2]
KEPT = ("tests/golden/", "tests/real/test_vllm_cpu.py")  # pinned values; one start of a real vLLM


def mostly_slow(cases: Iterable[Any], quick: Collection[str], *, name: Callable[[Any], str] = str) -> list[Any]:
    """Return parameters of a test: those whose name is in `quick` as they are, the others marked as slow.

    Raises ValueError for a name that no case has.
    """
    cases = list(cases)
    if missing := set(quick) - {name(case) for case in cases}:
        raise ValueError(f"no such case: {', '.join(sorted(missing))}")
    return [pytest.param(case, id=name(case), marks=[] if name(case) in quick else pytest.mark.slow) for case in cases]


def mark_slow_tests(items: list[pytest.Item], *, whole: bool) -> None:
    """Mark the tests of slow_tests.txt. Raises UsageError for an entry that is no test any more, if `whole`: if all
    tests of a file have been collected wherever one has."""
    listed = set(SLOW_TESTS.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    files = {item.nodeid.partition("::")[0] for item in items}
    gone = sorted(
        name
        for name in listed - {item.nodeid for item in items}
        if (file := name.partition("::")[0]) in files or not (ROOT / file).is_file()
    )
    if whole and gone:
        raise pytest.UsageError(f"{SLOW_TESTS.name}: no such test: {gone[0]}: rename it there, or take it out")


def list_slow_tests(report: Path, limit_s: float) -> list[str]:
    """Return the ids to be listed by a JUnit report, which names a file by its module."""
    cases: dict[str, list[tuple[float, str]]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        file = case.attrib["classname"].replace(".", "/") + ".py"
        name = case.attrib["name"]
        cases.setdefault(f"{file}::{name.partition('[')[0]}", []).append(
            (float(case.attrib["time"]), f"{file}::{name}")
        )
    slow = []
    for test, timed in cases.items():
        (first_s, first), *others = sorted(timed)
        if not test.startswith(KEPT):
            slow += [first] if first_s >= limit_s * (1.5 if others else 1) else []
            slow += [name for seconds, name in others if seconds >= limit_s]
    return sorted(slow)


if __name__ == "__main__":
    listed = set(SLOW_TESTS.read_text(encoding="utf-8").splitlines()) if SLOW_TESTS.exists() else set()
    listed |= set(list_slow_tests(Path(sys.argv[1]), float(sys.argv[2])))
    SLOW_TESTS.write_text("\n".join(sorted(listed)) + "\n", encoding="utf-8")
