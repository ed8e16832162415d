"""data/imbalance.py: exact counts, the same rows for the same seed, errors where a class has too few rows."""

import collections

import pytest

from ba_lora.errors import UserError
from data.imbalance import complete_shares, imbalanced_rows, largest_remainder

CLASSES = ("entailment", "neutral", "contradiction")
LABELS = [0] * 100 + [1] * 60 + [2] * 40


def counts(indices: list[int]) -> list[int]:
    found = collections.Counter(LABELS[index] for index in indices)
    return [found[label] for label in range(3)]


def test_unnamed_classes_share_the_rest_in_their_own_proportion() -> None:
    shares = complete_shares({"contradiction": 0.2}, {"entailment": 100, "neutral": 60, "contradiction": 40})
    assert shares == pytest.approx({"entailment": 0.5, "neutral": 0.3, "contradiction": 0.2})


@pytest.mark.parametrize(
    ("shares", "num_rows", "expected"),
    [
        ({"a": 0.5, "b": 0.3, "c": 0.2}, 10, [5, 3, 2]),
        ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 10, [4, 3, 3]),  # a tie: the first class
        ({"a": 0.05, "b": 0.475, "c": 0.475}, 10, [0, 5, 5]),
        ({"a": 0.1, "b": 0.7, "c": 0.2}, 30, [3, 21, 6]),  # 0.1 × 30 is 3.0000000000000004, 0.7 × 30 is 20.99…
        ({"a": 0.46, "b": 0.34, "c": 0.2}, 7, [3, 2, 2]),  # 3.22, 2.38, 1.4: the largest remainder gets the seventh
    ],
)
def test_largest_remainder(shares: dict, num_rows: int, expected: list[int]) -> None:
    found = list(largest_remainder(shares, num_rows).values())
    assert found == expected and sum(found) == num_rows


def test_exact_counts_and_order() -> None:
    indices = imbalanced_rows(LABELS, {"contradiction": 0.05}, classes=CLASSES, num_rows=80)
    assert counts(indices) == [48, 28, 4]  # 47.5, 28.5, 4: the tie goes to the first class
    assert indices == sorted(set(indices))


def test_as_many_rows_as_the_data_allow() -> None:
    indices = imbalanced_rows(LABELS, {"neutral": 0.3, "contradiction": 0.2}, classes=CLASSES)
    assert counts(indices) == [100, 60, 40]  # the data's own shares
    indices = imbalanced_rows(LABELS, {"contradiction": 0.02}, classes=CLASSES)
    assert counts(indices) == [100, 60, 3]  # 3 of 163


def test_the_seed_decides_and_smaller_draws_are_part_of_larger_ones() -> None:
    few = imbalanced_rows(LABELS, {"contradiction": 0.05}, classes=CLASSES, num_rows=100, seed=1)
    many = imbalanced_rows(LABELS, {"contradiction": 0.2}, classes=CLASSES, num_rows=100, seed=1)
    again = imbalanced_rows(LABELS, {"contradiction": 0.05}, classes=CLASSES, num_rows=100, seed=1)
    other = imbalanced_rows(LABELS, {"contradiction": 0.05}, classes=CLASSES, num_rows=100, seed=2)
    rare = {index for index in few if LABELS[index] == 2}
    assert few == again and few != other
    assert len(rare) == 5 and rare < {index for index in many if LABELS[index] == 2}


def test_a_share_of_zero_leaves_the_class_out() -> None:
    assert counts(imbalanced_rows(LABELS, {"contradiction": 0.0}, classes=CLASSES)) == [100, 60, 0]


@pytest.mark.parametrize(
    ("shares", "num_rows", "message"),
    [
        ({"contradictory": 0.1}, None, "contradictory.*entailment, neutral, contradiction"),
        ({"neutral": 1.5}, None, "share of class neutral is 1.5"),
        ({"neutral": float("nan")}, None, "share of class neutral is nan"),
        ({"neutral": 0.7, "entailment": 0.7}, None, "add up to 1.4"),
        ({"neutral": 0.2, "entailment": 0.2, "contradiction": 0.2}, None, "add up to 0.6"),
        ({"contradiction": 0.5}, 100, "class contradiction has 40 rows and 50 are needed"),
        ({"contradiction": 0.001}, 100, "leaves no row of class contradiction"),
    ],
)
def test_errors_in_one_line(shares: dict, num_rows: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        imbalanced_rows(LABELS, shares, classes=CLASSES, num_rows=num_rows)
    assert "\n" not in str(error.value)


def test_a_class_without_rows_and_without_a_share_stays_empty() -> None:
    assert complete_shares({"a": 0.5, "b": 0.5}, {"a": 10, "b": 10, "c": 0}) == {"a": 0.5, "b": 0.5, "c": 0.0}


def test_a_class_without_rows_cannot_have_a_share() -> None:
    with pytest.raises(UserError, match="class contradiction has no row"):
        imbalanced_rows([0, 1, 0, 1], {"contradiction": 0.1}, classes=CLASSES)


def test_a_row_without_a_label_is_refused() -> None:
    """−1 stands for "none" in several sets; as an index it would be the last class."""
    with pytest.raises(UserError, match="row 2 has the label -1: classes are 0 to 2"):
        imbalanced_rows([0, 1, -1, 2], {"contradiction": 0.2}, classes=CLASSES)
