"""Hypotheses about what pre-trained models hand down: declared in the table's file, decided by a fixed rule.

    report:
      clusters: base                    # settings such as "noise=40 base=3": this word names the pre-trained model
      hypotheses:
        H0: {says: …, column: wrong, arms: [untuned], levels: [noise=40, noise=0], expected: above, margin: 5,
             condition: true}
        H1: {says: …, column: wrong, arms: [ba_lora, pissa], levels: [noise=40, noise=0], expected: below, margin: 1,
             primary: true, guard: {column: accuracy, margin: 1}}

The effect is [first arm − second arm] at the first level minus the same at the second one; with one arm, or one level,
without that difference. A pre-trained model is a cluster: the arms' runs on it are averaged over their seeds and
subtracted item by item, and what is tested is these values with models and items both as random effects (crossed.py;
two levels have models of their own, and are not taken as pairs). Where the items of a run are not known, of all runs
only their means count: the interval is over models only.

Decided on the column's scale by the 95 % interval: `supported` where it lies beyond the margin in the direction that is
expected, `refuted` where it lies within ± margin or on the other side of 0, else `undecided`. A primary one also needs
p < 0.05 by Holm over all that are declared primary, made or not. guard: supported only where the same effect at the
first level in another column is not below − margin. condition: all others are void where its effect is below the
margin, undecided where it is, and undecided without a number while it is not run. With fewer than five pre-trained
models at a level a hypothesis is undecided.
A hypothesis of which a run is missing is `not run`: nothing is told before all runs are there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ba_lora.config.structured import read_mapping
from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from ba_lora.words import check_choice
from eval.report.crossed import Array, Estimate, crossed_t, seeds_t
from eval.report.stats import LEAST_SEEDS, MOST_PRIMARY, SIGNIFICANT, holm

SUPPORTED, REFUTED, UNDECIDED, VOID, NOT_RUN = "supported", "refuted", "undecided", "void", "not run"
HOLDS, FAILS = "holds", "does not hold"  # of a condition


@dataclass(frozen=True)
class Guard:
    """The column in which an effect must not be below − margin, on the column's scale."""

    column: str
    margin: float


@dataclass(frozen=True)
class Hypothesis:
    """One of them, see the head of this module."""

    name: str
    says: str
    column: str
    arms: tuple[str, ...]
    levels: tuple[str, ...]
    expected: str
    margin: float
    primary: bool = False
    condition: bool = False
    guard: Guard | None = None


@dataclass(frozen=True)
class Finding:
    """What came of a hypothesis, on its column's scale. num_clusters: pre-trained models at each level; guard: the
    effect in the guard's column; num_missing: runs that are not there, then nothing else is told."""

    hypothesis: Hypothesis
    decision: str
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    df: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    num_clusters: tuple[int, ...] = ()
    num_items: int | None = None
    guard: float | None = None
    num_missing: int = 0


def parse_hypotheses(
    block: Mapping[str, Any], rows: Sequence[Row], columns: Sequence[str], *, clusters: str, where: str
) -> tuple[Hypothesis, ...]:
    """Check the entries. Raises UserError for one that is wrong, and for more than five primary ones."""
    known = {
        "arms": list(dict.fromkeys(row.method for row in rows)),
        "levels": list(dict.fromkeys(level_of(row, clusters) for row in rows)),
    }
    found = []
    for name, entry in block.items():
        at = f"{where}.{name}"
        one = read_mapping(Hypothesis, entry, where=at, name=name)
        for key, choices in known.items():
            words = getattr(one, key)
            if len(words) not in (1, 2):
                raise UserError(f"{at}: {key}: one or two are needed, found {len(words)}")
            for word in words:
                check_choice(f"{at}: {key}", word, choices)
        for part in (one, *([one.guard] if one.guard else [])):
            check_choice(f"{at}: column", part.column, columns)
            if part.margin < 0:
                raise UserError(f"{at}: margin must be a number of at least 0, found {part.margin:g}")
        check_choice(f"{at}: expected", one.expected, ("above", "below"))
        found.append(one)
    number = sum(one.primary for one in found)
    if number > MOST_PRIMARY:
        raise UserError(f"{where}: {number} primary hypotheses, at most {MOST_PRIMARY} are allowed")
    return tuple(found)


def level_of(row: Row, clusters: str) -> str:
    """Return a row's setting without the word that names its pre-trained model."""
    return " ".join(word for word in row.setting.split() if not word.startswith(f"{clusters}="))


class Clusters:
    """The values of a table's runs by pre-trained model. `values`: (row, column's name) → the items' ids and of each
    run their values [runs, N], or where these are not known None and its mean [runs, 1], on the column's scale."""

    def __init__(self, rows: Sequence[Row], clusters: str, values: Any, num_missing: Any) -> None:
        self._rows, self._clusters, self._values, self._num_missing = rows, clusters, values, num_missing

    def rows_at(self, method: str, level: str) -> list[Row]:
        return [row for row in self._rows if row.method == method and level_of(row, self._clusters) == level]

    def missing(self, one: Hypothesis) -> int:
        """Return how many runs a hypothesis lacks."""
        columns = [one.column, *([one.guard.column] if one.guard else [])]
        rows = [row for method in one.arms for level in one.levels for row in self.rows_at(method, level)]
        return max(sum(self._num_missing(row, column) for row in rows) for column in columns)

    def effect_at(self, arms: Sequence[str], level: str, column: str) -> tuple[tuple[str, ...] | None, Array]:
        """Return the items' ids and [models, N]: the first arm's values minus the second's, each a mean over its runs
        on the model; None and N = 1 where the items of a run are not known. Raises UserError where items differ."""
        of_arms = [{self._cluster(row): row for row in self.rows_at(method, level)} for method in arms]
        common = [name for name in of_arms[0] if all(name in of for of in of_arms)]
        if not common or any(len(of) != len(common) for of in of_arms):
            raise UserError(f"hypotheses: {' and '.join(arms)} at {level} have not the same pre-trained models")
        read = [[self._values(of[name], column) for name in common] for of in of_arms]
        ids = _common([ids for of in read for ids, _ in of], f"{' and '.join(arms)} at {level}", column)
        found = [[values.mean(axis=0) for _, values in of] for of in read]
        if ids is None:
            found = [[values.mean(keepdims=True) for values in of] for of in found]
        found = [np.stack(of) for of in found]
        return ids, found[0] if len(found) == 1 else found[0] - found[1]

    def _cluster(self, row: Row) -> str:
        return " ".join(word for word in row.setting.split() if word.startswith(f"{self._clusters}="))


def _common(sets: Sequence[tuple[str, ...] | None], arms: str, column: str) -> tuple[str, ...] | None:
    """Return the items that all have, None where those of one are not known. Raises UserError where they differ."""
    if None in sets:
        return None
    if len(set(sets)) > 1:
        raise UserError(f"hypotheses: {arms} have other items in column {column}: score both on one file")
    return sets[0]


def decide_all(hypotheses: Sequence[Hypothesis], clusters: Clusters) -> list[Finding]:
    """Return what came of each hypothesis."""
    found = [_find(one, clusters) for one in hypotheses]
    primary = [place for place, finding in enumerate(found) if finding.hypothesis.primary]
    adjusted = holm([1.0 if found[place].p is None else found[place].p for place in primary])
    for place, p in zip(primary, adjusted, strict=True):
        if found[place].p is not None:
            found[place] = dataclasses.replace(found[place], p_adjusted=p)
    found = [dataclasses.replace(finding, decision=_decision(finding)) for finding in found]
    conditions = {finding.decision for finding in found if finding.hypothesis.condition}
    return [one if one.hypothesis.condition or one.decision == NOT_RUN else _under(conditions, one) for one in found]


def _under(conditions: set[str], finding: Finding) -> Finding:
    """Return a hypothesis as the decisions on the conditions leave it."""
    if FAILS in conditions:
        return dataclasses.replace(finding, decision=VOID)
    if NOT_RUN in conditions:
        return Finding(finding.hypothesis, UNDECIDED)
    return finding if conditions <= {HOLDS} else dataclasses.replace(finding, decision=UNDECIDED)


def _find(one: Hypothesis, clusters: Clusters) -> Finding:
    if missing := clusters.missing(one):
        return Finding(one, NOT_RUN, num_missing=missing)
    read = [clusters.effect_at(one.arms, level, one.column) for level in one.levels]
    _common([ids for ids, _ in read], " and ".join(one.levels), one.column)
    levels = [values for _, values in read]
    if min(map(len, levels)) < 2:
        raise UserError(f"hypothesis {one.name}: a level with one pre-trained model tells nothing: take two or more")
    estimate = effect(levels)
    guard = None
    if one.guard:
        guard = float(clusters.effect_at(one.arms, one.levels[0], one.guard.column)[1].mean())
    facts = {key: getattr(estimate, key) for key in ("difference", "low", "high", "df", "num_items")}
    few = min(map(len, levels)) < LEAST_SEEDS
    p = None if few else estimate.p
    return Finding(one, UNDECIDED, **facts, p=p, num_clusters=tuple(map(len, levels)), guard=guard)


def effect(levels: Sequence[Array]) -> Estimate:
    """Test mean(first) − mean(second), or of one level its mean against 0; each [models, N], both random. Where N is 1
    in one of them, the models only are."""
    first, second = levels if len(levels) == 2 else (levels[0], np.zeros_like(levels[0]))
    paired = len(levels) == 1
    if 1 in (first.shape[1], second.shape[1]):
        return seeds_t(first.mean(axis=1), second.mean(axis=1), paired=paired)
    return crossed_t([(first, second)], paired=paired)


def _decision(finding: Finding) -> str:
    one = finding.hypothesis
    if finding.decision == NOT_RUN:
        return NOT_RUN
    if min(finding.num_clusters) < LEAST_SEEDS:
        return UNDECIDED
    sign = 1 if one.expected == "above" else -1
    if one.condition:
        return HOLDS if sign * finding.difference >= one.margin else FAILS
    if finding.low is None:
        return UNDECIDED
    low, high = sorted((sign * finding.low, sign * finding.high))
    if high < 0 or (low >= -one.margin and high <= one.margin):
        return REFUTED
    guarded = finding.guard is None or finding.guard >= -one.guard.margin
    certain = not one.primary or (finding.p_adjusted is not None and finding.p_adjusted < SIGNIFICANT)
    return SUPPORTED if low > one.margin and guarded and certain else UNDECIDED


def standing(declared: Mapping[str, Any] | None, deciding: Mapping[str, Any], sha256: str, *, any_primary: bool) -> str:
    """Return a sentence on whether the hypotheses stood before the first run; see ba_lora/experiments/state.py. Without
    a primary one nothing is confirmed: a table planned after the results of another has none."""
    same = declared is not None and declared["sha256"] == sha256
    now = "the file is the same" if same else f"now it has the sha256 {sha256[:12]}"
    if declared is None:
        return f"Exploratory: it is not recorded what the table's file was when the first run started; {now}."
    at = f"{declared['declared_at']}, commit {str(declared.get('commit') or 'unknown')[:12]}"
    at += f", sha256 {declared['sha256'][:12]}"
    if declared["num_results"]:
        return f"Exploratory: {declared['num_results']} results were there when the file was recorded ({at}); {now}."
    changed = sorted(key for key in deciding if declared["tests"].get(key) != deciding[key])
    if changed:
        told = ", ".join(key.removesuffix("_sha256") for key in changed)
        return f"Exploratory: what decides them was changed since the first run ({at}; {now}): {told}."
    since = "is the same" if same else f"was changed since in what decides nothing: {now}"
    told = f"declared before the first run ({at}); the table's file {since}."
    if declared.get("dirty"):
        return f"Exploratory: the table's file was not committed when it was recorded; {told}"
    return f"Confirmatory: {told}" if any_primary else f"Exploratory: no hypothesis is primary; {told}"
