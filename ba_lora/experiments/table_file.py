"""What a file of configs/tables says: `TableFile`, its blocks of rows and its columns, typed and checked.

    title: Accuracy over ranks          heading
    source: 2024, figure 4              where the paper has it; absent: beyond the paper
    paper: [ranks]                      files of results/paper_reported with its numbers (table, model, method, setting,
                                        task, metric, …); absent: none are known
    note: …                             protocol and departures, printed under the table
    kind: nlg                           nlg | nlu: whose bases (configs/<kind>) and whose training script
    seeds: [42, 1, 2]
    overrides: [export.merged=false]    key=value on every run
    rows:                               each entry is a product bases × methods × settings, with overrides of its own
      - bases: [llama-2-7b]             files of configs/<kind>
        methods: [lora, pissa]          methods (configs/methods), or `untuned`: the pre-trained model itself
        settings: {rank=8: [adapter.rank=8]}     the paper's name of a setting → its overrides; absent: one, ""
        overrides: […]
        search: tuned                   each row takes the best values of its base's and method's own search
                                        (sh scripts/search.sh BASE tuned method=METHOD) beneath its settings; the
                                        grid runs nothing while one is missing
        gpus: 8                         GPUs of each run, whose batch its overrides divide among them; absent: 1
        suffix: vllm                    a run folder of its own (outputs/<run_id>-vllm) where nothing that is trained
                                        differs from another row's; also part of the setting's name
    columns:                            name → what is read from a run's result
      gsm8k: {task: gsm8k, metric: strict, overrides: [data.name=metamathqa]}
      seconds: {metric: training.seconds, …}
      average: {mean_of: [gsm8k, math]}
    prepare: [[data.lab, rule=0]]       modules with their words that the grid runs first, such as what makes the bases
    chosen: tuning                      each method's rows also take what results/tuning/chosen.yaml says, the report of
                                        that table: method → overrides; the grid runs nothing while it is not there
    cost: 2 hours of one core           what the whole takes, as measured; told by --dry-run
    labels: {ba_lora: BA-LoRA (2024)}   method, base or column → how it is written; absent: as in
                                        configs/labels.yaml, or its name
    ours: [ba_lora]                     the methods compared with all others; absent: those whose name begins so
    report: {…}                         how eval.report shows it, and its figures: see eval/report/block.py

A column:

    task       the evaluation that holds the metric (NLU: a dev or out-of-domain set); absent: the run's result itself
    metric     a name in the task's `metrics`, or a dotted path in its entry (ratings.overall), or, without a task, in
               the result (training.peak_memory_mb); `{a,b}` in a path: the mean over a and b (eval/report/columns.py)
    unit       percent (the default: a fraction, shown times 100) | any other word, shown with the value as it is
    better     higher (the default) | lower | none (nothing is marked best)
    paper      the metric's name in the paper's file, where it is another; `paper_task` likewise
    overrides  what this column's runs differ in, such as the training set; columns whose runs train alike share them
    mean_of    names of columns: the mean over them, seed by seed
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ba_lora.config.layers import read_yaml
from ba_lora.config.structured import read_mapping
from ba_lora.errors import UserError
from ba_lora.paths import PROJECT_ROOT
from ba_lora.words import check_choice, nearest

PAPER_PATH = PROJECT_ROOT / "results" / "paper_reported"
KINDS = ("nlg", "nlu")
BETTER = ("higher", "lower", "none")


@dataclass(frozen=True)
class Column:
    """A column; the fields are those of the file, see this module's head."""

    name: str
    task: str | None = None
    metric: str | None = None
    unit: str = "percent"
    better: str = "higher"
    paper: str | None = None
    paper_task: str | None = None
    overrides: tuple[str, ...] = ()
    mean_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowBlock:
    """An entry of `rows`: a product of bases, methods and settings."""

    bases: tuple[str, ...]
    methods: tuple[str, ...]
    settings: dict[str, list[str]] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    search: str | None = None
    gpus: int = 1
    suffix: str = ""


@dataclass(frozen=True)
class TableFile:
    """The file; see this module's head. `rows` and `columns` as they stand there: their own types are read one by one,
    so that an error names the entry."""

    title: str
    kind: str
    rows: tuple[Any, ...]
    columns: dict[str, Any]
    seeds: tuple[int, ...]
    source: str | None = None
    paper: tuple[str, ...] = ()
    note: str | None = None
    overrides: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    ours: tuple[str, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    prepare: tuple[tuple[str, ...], ...] = ()
    chosen: str | None = None
    cost: str | None = None


def read_table_file(path: Path) -> tuple[TableFile, list[RowBlock], list[Column]]:
    """Return a table's file, its blocks of rows and its columns. Raises UserError for anything wrong in it."""
    file = read_mapping(TableFile, read_yaml(path), where=path)
    check_choice(f"{path}: kind", file.kind, KINDS)
    for key in ("seeds", "rows", "columns"):
        if not getattr(file, key):
            raise UserError(f"{path}: {key} is empty; the head of ba_lora/experiments/table_file.py describes the file")
    for name in file.paper:
        if not (PAPER_PATH / f"{name}.csv").is_file():
            raise UserError(f"{path}: paper: no such file: {PAPER_PATH / name}.csv")
    blocks = []
    for number, entry in enumerate(file.rows, start=1):
        if isinstance(entry, dict) and isinstance(entry.get("settings"), dict):  # `published:` changes nothing
            entry = entry | {"settings": {name: words or [] for name, words in entry["settings"].items()}}
        block = read_mapping(RowBlock, entry, where=f"{path}: rows, entry {number}")
        if block.gpus < 1:
            raise UserError(f"{path}: rows, entry {number}: gpus: {block.gpus}: at least 1 is needed")
        blocks.append(block)
    columns = [
        read_mapping(Column, entry, where=f"{path}: columns.{name}", name=name) for name, entry in file.columns.items()
    ]
    measured = [column.name for column in columns if not column.mean_of]
    for column in columns:
        where = f"{path}: columns.{column.name}"
        if bool(column.mean_of) == bool(column.metric):
            raise UserError(f"{where}: either metric or mean_of is needed")
        check_choice(f"{where}: better", column.better, BETTER)
        for name in column.mean_of:
            if name not in measured:
                raise UserError(f"{where}: no column {name}{nearest(name, measured)}")
    return file, blocks, columns
