"""What a table declares before its first run: its primary tests, and when a run counts as collapsed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ba_lora.config.structured import read_mapping
from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from ba_lora.words import check_choice


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


def parse_primary(
    entries: Sequence[Any], rows: Sequence[Row], columns: Sequence[str], *, where: str
) -> tuple[Primary, ...]:
    known = {key: list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("base", "method", "setting")}
    chosen = []
    for entry in entries:
        test = read_mapping(Primary, entry, where=where)
        check_choice(f"{where}: column", test.column, columns)
        for key in ("focus", "against"):
            check_choice(f"{where}: {key}", getattr(test, key), [*known["method"], *known["setting"]])
        for key in ("base", "setting"):
            if getattr(test, key) is not None:
                check_choice(f"{where}: {key}", getattr(test, key), known[key])
        chosen.append(test)
    return tuple(chosen)


def parse_collapse(entry: Any, columns: Sequence[str], *, where: str) -> Collapse:
    collapse = read_mapping(Collapse, entry, where=where)
    if (collapse.below is None) == (collapse.above is None):
        raise UserError(f"{where}: below or above is needed, one of them")
    for name in (collapse.column, *collapse.columns):
        check_choice(f"{where}: column", name, columns)
    return collapse
