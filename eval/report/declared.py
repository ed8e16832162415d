"""What a table declares before its first run: its primary tests, and when a run counts as collapsed."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from eval.report.checks import choice, mapping, words
from eval.report.stats import MOST_PRIMARY

if TYPE_CHECKING:
    from eval.report.spec import Column, TableSpec


@dataclass(frozen=True)
class Primary:
    """A test that the table declares beforehand: in `column`, the method or setting `focus` against `against`; in one
    base or setting, or where these are None in each that has both."""

    column: str
    focus: str
    against: str
    base: str | None = None
    setting: str | None = None

    def as_entry(self) -> dict[str, str]:
        """Return it as the table's file has it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    def is_of(self, column: "Column", focus: Row, other: Row) -> bool:
        """Whether this comparison is one of those declared."""
        return (
            column.name == self.column
            and self.focus in (focus.method, focus.setting)
            and self.against in (other.method, other.setting)
            and self.base in (None, focus.base)
            and self.setting in (None, focus.setting)
        )


@dataclass(frozen=True)
class Collapse:
    """When a run counts as collapsed: its value in `column`, as shown, is below or above a bound; and in which columns
    it is then left out of the mean and counted as a failure (empty: all that are measured on the trained model)."""

    column: str
    below: float | None = None
    above: float | None = None
    columns: tuple[str, ...] = ()

    def is_beyond(self, value: float) -> bool:
        """Whether a run of this value is collapsed."""
        return (self.below is not None and value < self.below) or (self.above is not None and value > self.above)

    @property
    def bound(self) -> str:
        """The bound in words."""
        return f"below {self.below:g}" if self.below is not None else f"above {self.above:g}"


def parse_primary(entries: Any, rows: Sequence[Row], columns: Sequence[str], *, where: str) -> tuple[Primary, ...]:
    if not isinstance(entries, list):
        raise UserError(f"{where} must be a list of tests, [{{column: …, focus: …, against: …}}, …], found {entries!r}")
    known = {key: list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("base", "method", "setting")}
    chosen = []
    for entry in entries:
        entry = mapping(entry, [field.name for field in dataclasses.fields(Primary)], where=where)
        if missing := [key for key in ("column", "focus", "against") if key not in entry]:
            raise UserError(f"{where}: {' and '.join(missing)} is missing in {entry}")
        choice(entry["column"], columns, where=where)
        for key in ("focus", "against"):
            choice(entry[key], [*known["method"], *known["setting"]], where=where)
        for key in ("base", "setting"):
            if key in entry:
                choice(entry[key], known[key], where=where)
        chosen.append(Primary(**entry))
    return tuple(chosen)


def parse_collapse(entry: Any, columns: Sequence[str], *, where: str) -> Collapse:
    entry = mapping(entry, ("column", "below", "above", "columns"), where=where)
    if "column" not in entry or ("below" in entry) == ("above" in entry):
        raise UserError(f"{where}: column, and below or above are needed")
    for key in ("below", "above"):
        if key in entry and (isinstance(entry[key], bool) or not isinstance(entry[key], int | float)):
            raise UserError(f"{where}: {key} must be a number, found {entry[key]!r}")
    entry["columns"] = words(entry.get("columns", []), where=f"{where}: columns")
    for name in (entry["column"], *entry["columns"]):
        choice(name, columns, where=where)
    return Collapse(**entry)


def num_primary(spec: "TableSpec", *, source: str) -> int:
    """Return how many tests the primary family has. Raises UserError for an entry that is no comparison of the table,
    and for more than five tests."""
    from eval.report.comparisons import planned_comparisons

    planned = planned_comparisons(spec, spec.rows)
    if spec.choose:  # one of a method's settings will be compared
        planned = [(c, Row(f.base, f.method), Row(o.base, o.method)) for c, f, o in planned]
    planned = list(dict.fromkeys(planned))
    for one in spec.primary:
        if not any(one.is_of(*comparison) for comparison in planned):
            raise UserError(
                f"{source}: the table has no comparison of {one.focus} against {one.against} in {one.column}: see "
                "ours, against and compare"
            )
    number = sum(spec.is_primary(*comparison) for comparison in planned)
    if number > MOST_PRIMARY:
        raise UserError(f"{source}: {number} tests, at most {MOST_PRIMARY} are allowed: name a base or a setting")
    return number


def as_declared(spec: "TableSpec", record: Mapping[str, Any] | None) -> tuple["TableSpec", str]:
    """Return the table with the primary family that it may claim, and a sentence on what was declared when.

    record: what ba_lora.experiments.state.declare has written when the table's first run started; None where nothing was. The
    family counts only where it is the declared one, and no run had a result then: it never changes after a look.
    """
    without = dataclasses.replace(spec, primary=(), num_primary=0)
    if not spec.sha256:
        return spec, ""
    now = f"The table's file has the sha256 {spec.sha256[:12]}"
    if record is None:
        lost = "; its primary tests count as exploratory" if spec.primary else ""
        return without, f"{now}; what it was when the first run started is not recorded{lost}."
    same = record["sha256"] == spec.sha256
    then = f"the same as when the first run started ({record['declared_at']})" if same else (
        f"{record['sha256'][:12]} when the first run started ({record['declared_at']}): it was changed since"
    )  # fmt: skip
    if not spec.primary and not record["primary"]:
        return without, f"{now}, {then}."
    if record["num_results"]:
        return without, f"{now}, {then}; {record['num_results']} results were there before: no test is primary."
    if record["primary"] != [one.as_entry() for one in spec.primary]:
        return without, f"{now}, {then}; the primary tests were others: all tests count as exploratory."
    return spec, f"{now}, {then}; so are its primary tests."
