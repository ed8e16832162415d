"""What a table declares before its first run: its primary tests, and when a run counts as collapsed."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from eval.report.checks import choice, mapping, words


@dataclass(frozen=True)
class Primary:
    """A test that the table declares beforehand: in `column`, the method or setting `focus` against `against`; in one
    base or setting, or where these are None in each that has both."""

    column: str
    focus: str
    against: str
    base: str | None = None
    setting: str | None = None

    def is_of(self, column: str, focus: Row, other: Row) -> bool:
        """Whether this comparison is one of those declared."""
        return (
            column == self.column
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
