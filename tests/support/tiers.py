"""Which cases of a test the default suite runs; the others are left to the slow tier."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], quick: Collection[str], *, name: Callable[[Any], str] = str) -> list[Any]:
    """Return parameters of a test: those whose name is in `quick` as they are, the others marked as slow.

    Raises ValueError for a name that no case has.
    """
    cases = list(cases)
    if missing := set(quick) - {name(case) for case in cases}:
        raise ValueError(f"no such case: {', '.join(sorted(missing))}")
    return [pytest.param(case, id=name(case), marks=[] if name(case) in quick else pytest.mark.slow) for case in cases]
