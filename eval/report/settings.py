"""Which settings must agree before results may stand side by side in a column.

A difference is refused; `allow` (in the table's config, there for the table or a column, or allow=NAME on the command
line) admits it, and the cells that differ from the rest are footnoted. What a footnote says is "<setting>: <value>".
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ba_lora.config.schema import UNTUNED
from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from ba_lora.words import nearest
from eval.report.columns import ReportColumn
from eval.report.spec import PlannedRun, TableSpec
from eval.scoring import stale_reason

Entry = Mapping[str, Any]  # one task's part of a result's "evaluation"


@dataclass(frozen=True)
class Used:
    """A run whose value stands in a column, with its result."""

    row: Row
    run: PlannedRun
    column: ReportColumn
    result: Mapping[str, Any]

    @property
    def entry(self) -> Entry:
        """The evaluation that the value comes from; empty for what training measured."""
        return (self.result.get("evaluation") or {}).get(self.column.task) or {}

    def generation(self, key: str) -> Any:
        return (self.entry.get("generation") or {}).get(key)

    def partial(self) -> str | None:
        """Return what the score lacks; of a run with eval.limit, which alike runs share, of what it is."""
        if not self.entry.get("partial"):
            return None
        missing, limit = self.entry.get("num_missing"), self.limit()
        if limit is None:
            return f"{missing} items missing"
        of = "a sample of" if "of_task" in self.entry else "the first"
        return f"{of} {limit} items (eval.limit), {missing} left out"

    def limit(self) -> int | None:
        """Return the run's eval.limit; None without one, and where the score is by a limit of its own."""
        limit = self.config("eval", "limit")
        return limit if (self.entry.get("generation") or {}).get("limit", limit) == limit else None

    def grader(self) -> dict[str, Any]:
        """What a grade depends on beside the task's version: package versions, choices, the sandbox and its limits."""
        return {key: self.entry.get(key) for key in ("packages", "post_processing", "thinking", "choices", "sandbox")}

    def other_options(self) -> str | None:
        """Return an option of the generation that is another than the table's, whose runs keep their names with it."""
        planned = self.run.config
        if planned is None or planned.kind == "nlu" or not self.entry.get("generation"):
            return None
        found, wanted = self.config("eval", "options") or {}, planned.eval.options
        names = [name for name in {**wanted, **found} if name != "serve" and found.get(name) != wanted.get(name)]
        told = [f"eval.options.{name} is {found.get(name)}, the table has {wanted.get(name)}" for name in names]
        return told[0] if told else None

    def training_data(self) -> list[Any]:
        """Return what identifies the training rows: their hash, or the hub's commit where none was taken; how many."""
        data = self.result.get("data") or {}
        return [data.get("sha256") or data.get("revision"), data.get("rows_used")]

    def config(self, *keys: str) -> Any:
        node = self.result.get("config") or {}
        for key in keys:
            node = (node or {}).get(key)
        return node


# Of what was evaluated; the same down a whole column.
EVALUATION: dict[str, Callable[[Used], Any]] = {
    "task_version": lambda used: used.entry.get("version"),
    "test_data": lambda used: used.entry.get("data_sha256"),
    "prompt": lambda used: used.entry.get("prompt_hash"),
    "template": lambda used: used.generation("template"),
    "engine": lambda used: used.generation("engine"),
    "engine_version": lambda used: used.generation("engine_version"),
    "dtype": lambda used: used.generation("dtype"),
    "sampling": lambda used: [used.generation("sampling"), used.generation("choices")],
    "grader": Used.grader,
    "judge": lambda used: (used.entry.get("judge") or {}).get("id"),
    "shots": lambda used: used.entry.get("shots"),
    "limit": lambda used: used.generation("limit"),
    "harness": lambda used: used.generation("harness"),
}
# Of how the runs were trained; the same among the rows that are compared with each other, the untuned model aside.
TRAINING: dict[str, Callable[[Used], Any]] = {
    "training_data": Used.training_data,
    "training_prompt": lambda used: used.result.get("prompt_hash"),
    "model_revision": lambda used: (used.result.get("model") or {}).get("revision"),
    "model_dtype": lambda used: used.config("model", "dtype"),
    "quantization": lambda used: used.config("model", "quantization"),
}
# Of what times and memory were measured on.
HARDWARE: dict[str, Callable[[Used], Any]] = {
    "hardware": lambda used: [
        (used.result.get("environment") or {}).get(key) for key in ("hardware", "num_processes", "num_threads")
    ],
}
# What no score in a table should have; the value says what is the matter.
FAULTS: dict[str, Callable[[Used], str | None]] = {
    "stale": lambda used: used.entry.get("stale") or stale_reason(used.entry),
    "partial": lambda used: used.partial(),
    "evaluated_otherwise": Used.other_options,
}
SETTINGS = (*EVALUATION, *TRAINING, *HARDWARE, *FAULTS)
NEVER_ALLOWED = {"judge": "ratings of two judges never stand in one table; have one judge rate all answers"}


def check_allowed(names: Iterable[str]) -> None:
    """Raise UserError for a name that is no setting, or one that must not differ."""
    for name in names:
        if name in NEVER_ALLOWED:
            raise UserError(f"allow={name}: {NEVER_ALLOWED[name]}")
        if name not in SETTINGS:
            raise UserError(f"allow={name} is no setting: {', '.join(SETTINGS)}{nearest(name, SETTINGS)}")


def differences(spec: TableSpec, used: Sequence[Used], *, allow: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Compare the settings of all that stands in a table; return (run_id, column name) → footnotes.

    Raises UserError, naming the first setting that differs without being allowed, its values and a run of each.
    """
    allow = tuple(allow)
    check_allowed([*allow, *(name for column in spec.columns for name in column.allow)])
    notes: dict[tuple[str, str], list[str]] = {}
    refused: list[tuple[str, str]] = []  # (setting, what is the matter)
    for name, group in _groups(spec, used):
        values = {id(one): _text((EVALUATION | TRAINING | HARDWARE)[name](one)) for one in group}
        counts = Counter(values.values())
        if len(counts) < 2:
            continue
        if name not in (*allow, *group[0].column.allow):
            shown = "; ".join(
                f"{value} ({next(one.run.run_id for one in group if values[id(one)] == value)})" for value in counts
            )
            refused.append((name, f"{name} differs in column {group[0].column.name}: {shown}"))
            continue
        usual = counts.most_common(1)[0][0]
        for one in group:
            if values[id(one)] != usual:
                notes.setdefault((one.run.run_id, one.column.name), []).append(f"{name}: {values[id(one)]}")
    limited = _alike_limits(used)
    for name, read in FAULTS.items():
        for one in used:
            fault = read(one)
            if fault is None:
                continue
            if name == "partial" and one.column in limited:
                pass
            elif name not in (*allow, *one.column.allow):
                refused.append((name, f"{one.run.run_id} {one.column.task} is {name}: {fault}"))
            notes.setdefault((one.run.run_id, one.column.name), []).append(f"{name}: {fault}")
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        setting, matter = min(refused, key=lambda one: one[0] not in NEVER_ALLOWED)
        fix = "make these runs alike, or admit it with allow=NAME[,NAME] and it is footnoted"
        raise UserError(f"table {spec.name}: {matter}{more}: {NEVER_ALLOWED.get(setting, fix)}")
    return notes


def _alike_limits(used: Sequence[Used]) -> set[ReportColumn]:
    """Return the columns whose scores are all of the same first items: their runs have the same eval.limit."""
    limits: dict[ReportColumn, set[Any]] = {}
    for one in used:
        partial = one.limit() if one.entry.get("partial") else None
        limits.setdefault(one.column, set()).add(partial and (partial, one.entry.get("num_missing")))
    return {column for column, found in limits.items() if len(found) == 1 and None not in found}


def _groups(spec: TableSpec, used: Sequence[Used]) -> Iterable[tuple[str, list[Used]]]:
    """Yield (setting, the runs among which it must agree)."""
    for column in spec.columns:
        members = [one for one in used if one.column == column]
        for name in EVALUATION if column.task else ():
            yield name, members
        for name in HARDWARE if column.is_cost else ():
            yield name, members
        blocks: dict[tuple[str, tuple[str, ...]], list[Used]] = {}  # two bases never share a revision
        for one in members:
            if one.run.method == UNTUNED:
                continue
            blocks.setdefault((one.row.base, spec.block(one.row)), []).append(one)
        for block in blocks.values():
            for name in TRAINING:
                yield name, block


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
