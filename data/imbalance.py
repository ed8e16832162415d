"""A training set with stated class shares, for the imbalance experiments. The paper's protocol is not published; ours:

1. `shares` gives the share of the training rows that named classes shall have, such as {"contradiction": 0.02}. Classes
   that are not named divide the rest in the proportion they have in the data. So one number makes one class rare.
2. The set is as large as the data allow, or `num_rows`. Exact counts come from the shares by largest remainder (ties
   go to the class with the lower id), so they add up to the number of rows.
3. Of each class that many rows are drawn without replacement, with a generator seeded by (seed, class): what is drawn
   of one class does not depend on the others' shares, and a smaller draw is part of a larger one. Rows keep the file's
   order.
4. Only the training set is changed. Evaluation is on the task's untouched dev set, by recall of each class, macro-F1
   and the recall of the minority class, the one whose share of the training set is smallest.

All methods and seeds of a comparison train on the same rows: the draw has its own seed, apart from the run's.
"""

import math
import random
from collections.abc import Mapping, Sequence

from ba_lora.errors import UserError


def imbalanced_rows(
    labels: Sequence[int],
    shares: Mapping[str, float],
    *,
    classes: Sequence[str],
    num_rows: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Return the indices of the rows to train on, ascending, such that classes have the asked shares.

    labels: class id of each row; classes: names by id; num_rows: how many rows to return, None: as many as possible.
    Raises UserError for an unknown class or label, shares outside [0, 1] or beyond a sum of 1, and a class with too few
    rows.
    """
    members = {name: [] for name in classes}
    for index, label in enumerate(labels):
        if not 0 <= label < len(classes):
            raise UserError(f"row {index} has the label {label}: classes are 0 to {len(classes) - 1}")
        members[classes[label]].append(index)
    available = {name: len(indices) for name, indices in members.items()}
    wanted = complete_shares(shares, available)
    counts = _counts(wanted, available, num_rows)
    chosen = []
    for name, count in counts.items():
        order = members[name].copy()
        random.Random(f"{seed}/{name}").shuffle(order)
        chosen += order[:count]
    return sorted(chosen)


def complete_shares(shares: Mapping[str, float], available: Mapping[str, int]) -> dict[str, float]:
    """Return a share for every class of `available` (class → rows in the data), adding up to 1."""
    for name, share in shares.items():
        if name not in available:
            raise UserError(f"class shares name {name!r}, which is no class here: classes are {', '.join(available)}")
        if not (math.isfinite(share) and 0 <= share <= 1):
            raise UserError(f"the share of class {name} is {share}: it must lie between 0 and 1")
    total = math.fsum(shares.values())
    others = sum(count for name, count in available.items() if name not in shares)
    if total > 1 + 1e-9:
        raise UserError(f"the class shares add up to {total:g}: they must not exceed 1")
    if others == 0 and total < 1 - 1e-9:
        raise UserError(f"the class shares add up to {total:g} and no other class has rows: make them add up to 1")
    rest = max(0.0, 1 - total)
    of_one = rest / others if others else 0.0
    return {name: shares.get(name, of_one * count) for name, count in available.items()}


def largest_remainder(shares: Mapping[str, float], num_rows: int) -> dict[str, int]:
    """Return whole numbers that add up to `num_rows`, each within 1 of share × num_rows (shares add up to 1)."""
    exact = {name: share * num_rows for name, share in shares.items()}
    counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - exact[name])  # stable: ties in the classes' order
    for name in by_remainder[: num_rows - sum(counts.values())]:
        counts[name] += 1
    return counts


def _counts(shares: Mapping[str, float], available: Mapping[str, int], num_rows: int | None) -> dict[str, int]:
    """Return rows of each class; for `num_rows` None the largest set whose counts the data can fill."""
    if num_rows is None:
        limit = min(count / shares[name] for name, count in available.items() if shares[name] > 0)
        num_rows = math.floor(limit + 1e-9)
        while any(count > available[name] for name, count in largest_remainder(shares, num_rows).items()):
            num_rows -= 1
        if num_rows == 0:
            empty = next(name for name, count in available.items() if shares[name] > 0 and count == 0)
            raise UserError(f"class {empty} has no row in the data: give it a share of 0")
    counts = largest_remainder(shares, num_rows)
    for name, count in counts.items():
        if count > available[name]:
            raise UserError(
                f"class {name} has {available[name]} rows and {count} are needed for a share of {shares[name]:g} of "
                f"{num_rows} rows: lower its share or the number of rows"
            )
        if count == 0 and shares[name] > 0:
            raise UserError(f"a share of {shares[name]:g} of {num_rows} rows leaves no row of class {name}: raise it")
    return counts
