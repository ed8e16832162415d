"""What the command line of a grid says: its own options, the rows it is for, and the overrides of every run."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ba_lora.config.checks import check_place
from ba_lora.config.layers import SCHEMAS, override_layer, valid_keys
from ba_lora.config.schema import UNTUNED
from ba_lora.config.structured import read_typed
from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row, Table
from ba_lora.paths import written_path
from ba_lora.words import nearest, read_list, read_numbers, take_options

REPORT_OPTIONS = ("output", "allow", "page")
MAX_WORKERS = 1024
EXECUTOR_KEY = "executor."
OPTIONS = ("retry", "workers", "gpus", "seeds", "only", "executor", "cancel", *REPORT_OPTIONS)


@dataclass(frozen=True)
class GridOptions:
    """What the command line says of the grid itself."""

    retry: bool = False
    workers: int | None = None
    gpus: int | None = None
    seeds: tuple[int, ...] | None = None
    only: tuple[str, ...] = ()
    executor: str = "local"
    executor_settings: dict[str, Any] = field(default_factory=dict)  # typed as executor.KEY=VALUE
    cancel: bool = False
    output: Path | None = None  # the report's folder, absolute; None: the table's own
    report: tuple[str, ...] = ()  # words for the report only, as they were typed
    running: tuple[str, ...] = ()  # words on how and where the runs are worked on, as they were typed


def take_executor_settings(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what the words executor.KEY=VALUE say, and the other words."""
    own = [word.removeprefix(EXECUTOR_KEY) for word in words if word.startswith(EXECUTOR_KEY)]
    return override_layer(own), [word for word in words if not word.startswith(EXECUTOR_KEY)]


def refuse_mistyped(words: Sequence[str], options: Sequence[str]) -> None:
    """Raise UserError for key=value whose key is one of these options but for a typing error, and no config's."""
    settings = {key for schema in SCHEMAS.values() for key in valid_keys(schema)}
    for key in (word.partition("=")[0] for word in words):
        if key not in settings and (near := difflib.get_close_matches(key, options, n=1)):
            raise UserError(f"unknown key {key} (nearest: {near[0]})")


def read_grid_options(words: Sequence[str]) -> tuple[GridOptions, list[str]]:
    """Return the grid's own options and the overrides from `key=value` words. Raises UserError for a bad value."""
    typed, overrides = take_options(words, OPTIONS, example="workers=2")
    running = [f"{key}={typed[key]}" for key in ("workers", "retry", "cancel", "executor") if key in typed]
    running += [word for word in overrides if word.startswith(EXECUTOR_KEY)]
    settings, overrides = take_executor_settings(overrides)
    refuse_mistyped(overrides, OPTIONS)
    if empty := [key for key, text in typed.items() if not text]:  # a variable of the shell that is not set
        raise UserError(f"{empty[0]}= has no value: give one, or leave it out")
    output = written_path(typed["output"]) if "output" in typed else None
    if output is not None:
        check_place(output, "output")
    report = tuple(f"{key}={typed.pop(key)}" for key in REPORT_OPTIONS if key in typed)
    options, listed = read_typed(
        GridOptions, [f"{key}={text}" for key, text in typed.items()], further=("seeds", "only")
    )
    for key in ("workers", "gpus"):
        number = getattr(options, key)
        if number is not None and not 1 <= number <= MAX_WORKERS:
            raise UserError(f"{key}={number}: a whole number from 1 to {MAX_WORKERS} is needed")
    options = replace(
        options,
        seeds=read_numbers("seeds", listed["seeds"]) if "seeds" in listed else None,
        only=tuple(read_list("only", listed["only"])) if "only" in listed else (),
        executor_settings=settings,
        output=output,
        report=report,
        running=tuple(running),
    )
    return options, overrides


def select_rows(table: Table, words: Sequence[str]) -> Table:
    """Return the table with only the named rows: of these bases, with these methods, in these settings, as far as the
    words name any. Raises UserError for a word that names none, and where no row is left, or was there before."""
    if not table.cells:
        raise UserError(f"{table.id}: the table has no run: every entry of rows needs bases and methods")
    if not words:
        return table
    names = {key: {getattr(row, key) for row in table.rows} - {""} for key in ("base", "method", "setting")}
    known = sorted(set().union(*names.values()))
    for word in words:
        if word not in known:
            raise UserError(f"only={word} names no row{nearest(word, known)}; there are {', '.join(known)}")
    chosen = {key: known & set(words) for key, known in names.items()}
    rows = tuple(row for row in table.rows if all(not c or getattr(row, key) in c for key, c in chosen.items()))
    if not rows:
        raise UserError(f"only={','.join(words)}: no row is all of that")
    return _with_rows(table, rows)


def rows_for_gpus(table: Table, gpus: int | None) -> tuple[Table, int, list[str]]:
    """Return the table with the rows that are set for so many GPUs a run, that number, and a line on each row left out.

    None: one GPU, or the fewest that a row is set for. Raises UserError where no row is set for `gpus`: on another
    number of GPUs the effective batch would be another.
    """
    numbers = sorted({table.gpus[row] for row in table.rows})
    chosen = numbers[0] if gpus is None else gpus
    rows = tuple(row for row in table.rows if table.gpus[row] == chosen)
    if not rows:
        raise UserError(
            f"gpus={chosen}: the rows of {table.id} are set for {' or '.join(map(str, numbers))} GPU(s) a run; for "
            "another number set gpus and trainer.gradient_accumulation_steps of the row in the table's file"
        )
    left_out: dict[tuple[str, int], int] = {}
    for cells in table.cells_of_runs.values():
        row = cells[0].row
        if (needed := table.gpus[row]) != chosen:
            left_out[row.method, needed] = left_out.get((row.method, needed), 0) + 1
    lines = [f"left out: {number} runs of {method}: they take gpus={n}" for (method, n), number in left_out.items()]
    return _with_rows(table, rows), chosen, lines


def without_unchosen(table: Table) -> tuple[Table, list[str]]:
    """Return the table without runs whose settings are not chosen yet, and a line on each command that chooses them.

    Raises UserError where no other run is a training.
    """
    commands: dict[str, dict[str, None]] = {}
    for row, command in table.unchosen.items():
        commands.setdefault(command, {})[row.method] = None
    lines = [f"not chosen yet: the settings of {', '.join(names)}: {command}" for command, names in commands.items()]
    if lines and not {row for row in table.rows if row.method != UNTUNED} - set(table.unchosen):
        raise UserError(f"{table.id}: {'; '.join(lines)}")
    return replace(table, cells=tuple(cell for cell in table.cells if cell.row not in table.unchosen)), lines


def _with_rows(table: Table, rows: tuple[Row, ...]) -> Table:
    cells = tuple(cell for cell in table.cells if cell.row in rows)
    ours = tuple(name for name in table.ours if any(row.method == name for row in rows))
    return replace(table, rows=rows, cells=cells, ours=ours)
