"""What a table consists of: a file of configs/tables (table_file.py) → rows, columns, and the run behind each cell.

Rows and columns keep the file's order. The key=value of the command line come last and change every run; what tells the
rows or columns of the table apart cannot be typed.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ba_lora.config.checks import check_config
from ba_lora.config.layers import only_typed, override_layer, read_yaml
from ba_lora.config.methods import init_facts, plain_lora_folder, tuner_facts
from ba_lora.config.schema import UNTUNED, RunConfig
from ba_lora.errors import UserError
from ba_lora.experiments.search.best import best_words, finished_searches
from ba_lora.experiments.spec import Spec, untuned_config
from ba_lora.experiments.table_file import Column, RowBlock, read_table_file
from ba_lora.glue import find_task
from ba_lora.io import sha256_file
from ba_lora.paths import PROJECT_ROOT, resolve_path
from ba_lora.words import nearest

TABLES_PATH = PROJECT_ROOT / "configs" / "tables"
LABELS_PATH = PROJECT_ROOT / "configs" / "labels.yaml"  # of names that many tables have
RESULTS_PATH = PROJECT_ROOT / "results"
FACTORS_CACHE = "outputs/pissa_factors"  # one SVD of each base's matrices serves the seeds and methods of all tables
CHOSEN = "chosen.yaml"  # in the folder of a report that chooses settings


@dataclass(frozen=True)
class Row:
    """A line of the table: base × method × setting ("" where there is only one setting)."""

    base: str
    method: str
    setting: str = ""


@dataclass(frozen=True)
class SeedCell:
    """A cell of the table for one seed: the run of `row`'s training for `column` that its number comes from."""

    row: Row
    column: Column
    seed: int
    spec: Spec

    @property
    def config(self) -> RunConfig:
        """The resolved configuration; its `result_path` is the file that holds the number."""
        return self.spec.config

    @property
    def task(self) -> str | None:
        return self.column.task

    @property
    def metric(self) -> str | None:
        return self.column.metric


@dataclass(frozen=True)
class Table:
    """A table, resolved: everything that a grid needs to fill it and a report to print it."""

    id: str
    title: str
    source: str | None
    paper: tuple[str, ...]
    note: str | None
    kind: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    cells: tuple[SeedCell, ...]  # columns that are a mean of others have none
    labels: dict[str, str]
    ours: tuple[str, ...]
    gpus: dict[Row, int]  # how many GPUs each run of a row is set for
    report: dict[str, Any]
    sha256: str = ""  # of the file
    prepare: tuple[tuple[str, ...], ...] = ()  # (module, words …) to run first
    unchosen: dict[Row, str] = field(default_factory=dict)  # row → the command that is to choose its settings
    cost: str | None = None  # as its file says

    @functools.cached_property
    def cells_of_runs(self) -> dict[Path, list[SeedCell]]:
        """Run folder → the cells that read from this run; in the order of the rows."""
        runs: dict[Path, list[SeedCell]] = {}
        for cell in self.cells:
            runs.setdefault(cell.config.run_path, []).append(cell)
        return runs

    def specs(self) -> list[Spec]:
        """Return the runs, each once, in the order of the rows."""
        return [cells[0].spec for cells in self.cells_of_runs.values()]


def available_tables() -> list[str]:
    """Return the ids of the table files."""
    return sorted(path.stem for path in TABLES_PATH.glob("*.yaml"))


def find_table(name: str) -> Path:
    """Return the file of a table's id, or of a path to one. Raises UserError with the nearest ids."""
    path = resolve_path(name) if name.endswith((".yaml", ".yml")) else TABLES_PATH / f"{name}.yaml"
    if not path.is_file():
        known = available_tables()
        raise UserError(f"no such table: {name}{nearest(name, known)}; there are {', '.join(known)}")
    return path


def report_folder(name: str, words: Sequence[str] = ()) -> Path:
    """Return where the report of a table goes that was made with these seeds and key=value, in any order."""
    if not words:
        return RESULTS_PATH / name
    digest = hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:8]
    return RESULTS_PATH / f"{name}-{digest}"


def load_table(path: str | Path, *, overrides: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Table:
    """Read a table file and resolve every cell's run. Raises UserError, in one line, for anything wrong in it."""
    path = Path(path)
    file, blocks, columns = read_table_file(path)
    seeds = file.seeds if seeds is None else tuple(seeds)
    for seed in seeds:
        if seeds.count(seed) > 1:  # each of its runs would count more than once in a mean
            raise UserError(f"{path}: seed {seed} is asked for more than once: name each seed once")
    chosen = _chosen(file.chosen)
    rows: dict[Row, int] = {}  # row → GPUs
    unchosen: dict[Row, str] = {}
    cells: list[SeedCell] = []
    made: dict[str, tuple[str, ...]] = {}  # base, method → its finished searches
    _refuse_typed(overrides, _varied_keys(blocks, columns), kind=file.kind)
    for number, block in enumerate(blocks, start=1):
        where = f"{path}: rows, entry {number}"
        if "choose" in file.report:
            _check_names(block, clusters=file.report.get("clusters", ""), where=where)
        pairs = list(itertools.product(block.bases, block.methods))
        searched = {pair: best_words(*pair, block.search) for pair in pairs if block.search}
        made |= {" ".join(pair): finished_searches(*pair, block.search) for pair, words in searched.items() if words}
        found = {word.partition("=")[0] for words in searched.values() for word in words or ()}
        _refuse_typed(overrides, found, kind=file.kind)
        for (base, method), (setting, own) in itertools.product(pairs, (block.settings or {"": []}).items()):
            row = Row(base, method, " ".join(word for word in (setting, block.suffix) if word))
            if row in rows:
                raise UserError(f"{where}: {base}, {method}, {row.setting!r} stands in the table twice: take one out")
            rows[row] = block.gpus
            of_search = searched.get((base, method), [])
            of_table = chosen.get(method) if file.chosen and method != UNTUNED else []
            if of_search is None or of_table is None:
                search = f"search.sh {base} {block.search} method={method}"
                command = search if of_search is None else f"reproduce.sh {file.chosen}"
                unchosen[row] = f"sh scripts/{command}" + (f" gpus={block.gpus}" if block.gpus > 1 else "")
            words = [*file.overrides, *block.overrides, *(of_search or []), *(of_table or []), *own]
            cells += _row_cells(row, columns, file.kind, seeds, words, overrides, block.suffix, where)
    _refuse_two_evaluations(cells, path)
    _refuse_two_budgets(made, path)
    methods = list(dict.fromkeys(row.method for row in rows))
    ours = file.ours or tuple(name for name in methods if name.startswith("ba_lora"))
    for name in ours:
        if name not in methods:
            raise UserError(f"{path}: ours: no row has the method {name}{nearest(name, methods)}")
    return Table(
        id=path.stem,
        title=file.title,
        source=file.source,
        paper=file.paper,
        note=file.note,
        kind=file.kind,
        seeds=seeds,
        rows=tuple(rows),
        columns=tuple(columns),
        cells=tuple(cells),
        labels=read_yaml(LABELS_PATH) | file.labels,
        ours=ours,
        gpus=rows,
        report=file.report,
        sha256=sha256_file(path),
        prepare=tuple(map(tuple, file.prepare)),
        unchosen=unchosen,
        cost=file.cost,
    )


def _refuse_two_budgets(made: Mapping[str, tuple[str, ...]], path: Path) -> None:
    """Raise UserError where a method has the best of more searches than another, of a table's `search`."""
    if len(set(made.values())) > 1:
        told = "; ".join(f"{names}: {', '.join(found)}" for names, found in made.items())
        raise UserError(
            f"{path}: the methods were searched by unequal budgets ({told}): give each the same engines and "
            "search_seeds, or move the others out of outputs/searches"
        )


def _chosen(name: str | None) -> dict[str, list[str]]:
    """Return method → the overrides that another table's report has chosen, as far as it has."""
    if name is None:
        return {}
    find_table(name)
    path = RESULTS_PATH / name / CHOSEN
    found = read_yaml(path) if path.is_file() else {}
    if not all(isinstance(words, list) for words in found.values()):
        raise UserError(f"{path}: method: [key=value, …] is needed; sh scripts/reproduce.sh {name} writes it")
    return found


def _check_names(block: RowBlock, *, clusters: str, where: str) -> None:
    """Raise UserError where a setting's name, which another table will take as overrides, is not what its rows set."""
    for name, own in (block.settings or {}).items():
        for word in name.split():
            if word not in own and not word.startswith(f"{clusters}="):
                raise UserError(f"{where}: the setting {name} does not set {word}: name it by its overrides")


def _refuse_two_evaluations(cells: Sequence[SeedCell], path: Path) -> None:
    """Raise UserError where two rows or columns share a run, since they train alike, and ask to evaluate it unlike."""
    first: dict[Path, SeedCell] = {}
    for cell in cells:
        other = first.setdefault(cell.config.run_path, cell)
        if cell.config.eval != other.config.eval:
            told = " and ".join(repr(f"{c.row.method} {c.row.setting} {c.column.name}") for c in (other, cell))
            raise UserError(f"{path}: {told} are one run with two evaluations: give the rows of one a suffix")


def _varied_keys(blocks: Sequence[RowBlock], columns: Sequence[Column]) -> set[str]:
    """Return the keys that tell rows or columns apart: all of columns, and those that not all rows set, or not to one
    value."""
    rows: list[dict[str, str]] = []
    for block in blocks:
        for own in (block.settings or {"": []}).values():
            rows.append({key: value for key, _, value in (word.partition("=") for word in (*block.overrides, *own))})
    varied = {key for row in rows for key in row if any(other.get(key) != row[key] for other in rows)}
    return varied | {word.partition("=")[0] for column in columns for word in column.overrides}


def _refuse_typed(typed: Sequence[str], varied: set[str], *, kind: str) -> None:
    """Raise UserError for a typed key that the table varies: it would win, and every row or column would be what was
    typed, under the label of something else."""
    varied = {"method", *(["task"] if kind == "nlu" else []), *varied}
    for key in (word.partition("=")[0] for word in typed):
        if key in ("output_dir", "overwrite", "seed"):
            raise UserError(f"{key}= has no meaning for a whole table{nearest(key, ['seeds'])}")
        if any(f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.") for name in varied):
            raise UserError(f"{key} is what this table varies; use only=… for some of its rows, or change its file")


def _row_cells(
    row: Row,
    columns: Sequence[Column],
    kind: str,
    seeds: Sequence[int],
    words: Sequence[str],
    typed: Sequence[str],
    suffix: str,
    where: str,
) -> list[SeedCell]:
    """Return one row's cells. Columns that train alike share a run, which then evaluates the tasks of all of them."""
    cells = []
    groups: dict[tuple[str, ...], list[Column]] = {}
    for column in columns:
        if not column.mean_of:
            groups.setdefault(column.overrides, []).append(column)
    untuned = row.method == UNTUNED
    for overrides, members in groups.items():
        tasks = list(dict.fromkeys(column.task for column in members if column.task is not None))
        try:
            spec = _resolve(row, kind, [*words, *overrides], tasks, typed)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        for seed in seeds[:1] if untuned else seeds:
            cells += [
                SeedCell(row, column, seed, seeded) for seeded in [_with_seed(spec, seed, suffix)] for column in members
            ]
    return cells


def _resolve(row: Row, kind: str, words: Sequence[str], tasks: Sequence[str], typed: Sequence[str]) -> Spec:
    """Return the run of a row, of any seed, that gives scores of the tasks."""
    config_path = f"configs/{kind}/{row.base}.yaml"
    method = None if row.method == UNTUNED else row.method
    if kind == "nlu" and method is None:
        raise UserError(f"a classifier's head is new: there is no {UNTUNED} model to evaluate")
    for word in words:
        if _counts_only_typed(str(word)):
            raise UserError(f"{word} counts only when it is typed: take it out of the table's file")
    spec = Spec.resolve(config_path, method, [*words, *typed], kind=kind)
    if kind == "nlu":  # training scores the run's own dev sets; what is left are the sets out of its domain
        dev_sets = find_task(spec.config.nlu.task).dev_sets
        tasks = [name for name in tasks if name not in dev_sets]
    tasks_words = [f"eval.tasks=[{','.join(tasks)}]"]
    if method is None:
        spec = _with_defaults(spec, {"eval.tasks": tasks}, [], [*words, *tasks_words, *typed])
        return dataclasses.replace(spec, trained=False)
    adapter, more = spec.config.adapter, {}
    if init_facts(adapter).get("caches") and adapter.factors_cache is None:
        more["adapter.factors_cache"] = FACTORS_CACHE
    if kind == "nlg" and "serve" not in spec.config.eval.options:
        # All runs of a table that can be are served as adapters on their base: one engine start serves them all, and
        # none needs a merged model on disk. The choice must not depend on how many happen to be evaluated together.
        hot = plain_lora_folder(adapter) != "none" and spec.config.model.quantization == "none"
        served_hot = hot or not tuner_facts(adapter)["merges"]
        more |= (
            {"eval.options.serve": "hot", "export.merged": False} if served_hot else {"eval.options.serve": "merged"}
        )
    shown = [f"{key}={str(value).lower() if value is False else value}" for key, value in more.items()]
    spec = _with_defaults(spec, {**more, "eval.tasks": tasks}, shown, [*words, *tasks_words, *typed])
    return _with_own_reference(spec) if kind == "nlg" and spec.config.uses_reference_cache else spec


@functools.lru_cache(maxsize=4096)  # the words of a table come again in every row
def _counts_only_typed(word: str) -> bool:
    return bool(only_typed(override_layer([word])))


def _with_defaults(spec: Spec, values: dict[str, Any], more: Sequence[str], words: Sequence[str]) -> Spec:
    """Return the run of the `more` words, which say `values`, and the `words` over them.

    The config is changed where it is, since merging all its layers once more would take as long as the rest of a dry
    run; a key that the words set as well, or a whole section of which they set, is merged.
    """
    set_by_words = [word.partition("=")[0] for word in words if not word.startswith("eval.tasks=")]
    set_by_words += ["eval.tasks"] * (sum(word.startswith("eval.tasks=") for word in words) - 1)
    for key in values:
        if any(f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.") for name in set_by_words):
            return Spec.resolve(spec.config_path, spec.method, [*more, *words], kind=spec.kind)
    config = spec.config
    for key, value in values.items():
        *path, name = key.split(".")
        config = _replaced(config, path, name, value)
    check_config(config)
    return dataclasses.replace(spec, config=config, overrides=(*more, *words))


def _replaced(node: Any, path: Sequence[str], name: str, value: Any) -> Any:
    """Return a config, or a section of one, with another value at `path`, `name`."""
    if path:
        value = _replaced(
            getattr(node, path[0]) if not isinstance(node, dict) else node[path[0]], path[1:], name, value
        )
        name = path[0]
    return {**node, name: value} if isinstance(node, dict) else dataclasses.replace(node, **{name: value})


def _with_own_reference(spec: Spec) -> Spec:
    """Return the same run with a folder of its own below `reference.cache` for what the cache depends on.

    A cache holds one base's distributions on one set of rows; a table has several. Methods, ranks and seeds share it.
    (NLU's cache is a folder of such files as it is.)
    """
    config = spec.config
    reference = {key: value for key, value in vars(config.reference).items() if key != "cache"}
    parts = [dataclasses.asdict(config.model), dataclasses.asdict(config.data), reference]
    key = json.dumps([*parts, config.regularizers.temperature], sort_keys=True)
    name = f"{config.name}-{config.data.name}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    folder = str(Path(config.reference.cache) / name)
    config = dataclasses.replace(config, reference=dataclasses.replace(config.reference, cache=folder))
    return dataclasses.replace(spec, config=config, overrides=(*spec.overrides, f"reference.cache={folder}"))


def _with_seed(spec: Spec, seed: int, suffix: str) -> Spec:
    """Return the same run with another seed, and with a folder of its own where there is a suffix."""
    config = dataclasses.replace(spec.config, seed=seed)
    words = [*spec.overrides, f"seed={seed}"]
    if not spec.trained:
        return dataclasses.replace(spec, config=untuned_config(config), overrides=tuple(words))
    if suffix:
        folder = str(PROJECT_ROOT / "outputs" / f"{config.run_id}-{suffix}")
        config = dataclasses.replace(config, output_dir=folder)
        words.append(f"output_dir={folder}")
    return dataclasses.replace(spec, config=config.keep_run_id(), overrides=tuple(words))
