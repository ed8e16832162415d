"""The training sets of NLG by name: a file of configs/data each, or what a configuration says of rows of its own.

hub: OWNER/NAME                       where it lives, with `subset`, its configuration there; absent: only as a file
columns: {instruction: COL, input: COL, response: COL}             `input` may be absent
messages: COL                         or a list of turns: {role, content} or {from, value}
exchanges: 1                          only so many questions and answers of each conversation; absent: all
replace: {response: [[PATTERN, TEXT], …]}                          regular expressions on a column's text
"""

import dataclasses
import functools
import itertools
import re
from dataclasses import dataclass, field

from ba_lora.config.layers import read_yaml
from ba_lora.config.ranges import RANGES, check_range
from ba_lora.config.schema_nlg import NLGDataConfig, check_row_form
from ba_lora.config.structured import read_mapping
from ba_lora.errors import UserError
from ba_lora.paths import PROJECT_ROOT, resolve_data
from data import manifest

SETS_PATH = PROJECT_ROOT / "configs" / "data"


@dataclass(frozen=True)
class DataSet:
    """Where a set lives, and how a row becomes a conversation; see the module for the fields."""

    name: str
    hub: str | None = None
    subset: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    messages: str | None = None
    exchanges: int | None = None
    replace: dict[str, list[list[str]]] = field(default_factory=dict)

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that the rows must have."""
        if self.messages:
            return (self.messages,)
        return tuple(column for part, column in self.columns.items() if part != "input")

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that are read: those that must be there, and `input`."""
        return (self.messages,) if self.messages else tuple(self.columns.values())


@functools.cache
def named_set(name: str) -> DataSet:
    """Return the set that a file of configs/data describes. Raises UserError for a key or a form that is wrong."""
    path = SETS_PATH / f"{name}.yaml"
    found = read_mapping(DataSet, read_yaml(path), where=path, name=name)
    check_row_form(f"{path}: ", found.columns, found.messages, found.exchanges)
    if not (found.columns or found.messages):
        raise UserError(f"{path} names neither columns nor messages")
    if found.exchanges is not None:
        check_range(f"{path}: exchanges", found.exchanges, RANGES["data.exchanges"])
    if others := [part for part in found.replace if part not in found.columns]:
        has = f"columns has {', '.join(found.columns)}" if found.columns else "texts in messages are not replaced"
        raise UserError(f"{path}: replace.{others[0]} has no effect: {has}")
    try:
        for pattern, text in itertools.chain.from_iterable(found.replace.values()):
            re.sub(pattern, text, "")  # a text may name a group that its pattern lacks
    except (re.error, ValueError) as error:
        raise UserError(f"{path}: replace needs pairs of a pattern and a text ({error})") from error
    return found


def chosen_set(config: NLGDataConfig) -> DataSet:
    """Return the set that a configuration names, or that its own columns or messages describe. Raises UserError for a
    subset or exchanges that would have no effect."""
    local = [name for name in config.sources if resolve_data(name).startswith("/")]
    if config.subset is not None and local and local == config.sources:
        raise UserError(f"data.subset={config.subset} is of sets on the hub, and data.source is a file: leave it out")
    if not config.has_own_form:
        found = named_set(config.name)
        if config.exchanges is not None and found.columns:
            raise UserError(f"data.exchanges has no effect on data.name={config.name}: its rows are one exchange each")
        found = found if config.exchanges is None else dataclasses.replace(found, exchanges=config.exchanges)
        return found if config.subset is None else dataclasses.replace(found, subset=config.subset)
    return DataSet(
        name="own",
        subset=config.subset,
        columns=dict(config.columns),
        messages=config.messages,
        exchanges=config.exchanges,
    )


def places(config: NLGDataConfig, found: DataSet) -> list[str]:
    """Return the files or hub names (with @revision) to read. Raises UserError where a set has no place at all."""
    if config.source is None and found.hub is None:
        raise UserError(f"data.name={config.name} is no set of the hub's: name its file, data.source=FILE")
    names = [found.hub] if config.source is None else config.sources
    revision = config.revision
    if config.source is None:
        revision = revision or manifest.pinned_revision(found.name)
    resolved = [resolve_data(name) for name in names]
    return [f"{name}@{revision}" if revision and not name.startswith("/") else name for name in resolved]


def check_source(config: NLGDataConfig) -> None:
    """Raise UserError where a set has neither a place on the hub nor a file: found before a run's folder is made."""
    if config.source is not None or config.name != "toy":
        places(config, chosen_set(config))
