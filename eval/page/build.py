"""A page written: one folder that opens by a double click, without a network, and may be zipped and sent.

    index.html              the views, from templates/
    page.js, page.css       ours, from static/
    lib/                    DataTables and BokehJS, from their packages, and their licences
    data/page.js            the table and the list of runs
    data/run-<n>.js         a run: settings, scores, curves; loaded when a cell is opened
    data/answers-<n>-<m>.js its answers to a task; data/items-<k>.js: what was asked, shared by the runs on one set
    data/values-<n>.js      the items' values behind a column's paired tests
    figures/                the report's figures

The page is made whatever is missing; `write_page` returns what is, and the page says it too.
"""

import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ba_lora.config.checks import check_place
from ba_lora.errors import UserError
from ba_lora.io import folder_atomic
from eval.page.items import Answers, has_answers, read_answers
from eval.page.loose import LOWER, shape_of
from eval.page.runs import ShownRun, describe_run
from eval.page.scripts import libraries, script
from eval.page.view import item_values, runs_of, table_view
from eval.report.sheets import Drawn
from eval.report.sources import Sources
from eval.report.table import ReportTable

HERE = Path(__file__).parent
SCRIPTS = (
    "core.js",
    "text.js",
    "table.js",
    "curves.js",
    "cell.js",
    "answers.js",
    "compare.js",
    "training.js",
    "main.js",
)
PARTS = {"index.html", "page.js", "page.css", "lib", "data", "figures"}  # all that stands in a page's folder
# Nothing runs but the page's own files, and nothing is fetched or sent. Styles are set by the libraries' scripts.
POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file: 'unsafe-inline'; img-src 'self' file: data:; "
    "base-uri 'none'; form-action 'none'"
)


def shown_runs(table: ReportTable, sources: Sources) -> list[ShownRun]:
    """Return the table's runs that have a result, in the order of its rows."""
    return [
        ShownRun(run.run_id, result, run.run_path)
        for run in table.spec.all_runs()
        if (result := sources.result(run)) is not None
    ]


def own_script() -> str:
    """Return page.js: our scripts in one."""
    return "\n".join((HERE / "static" / name).read_text(encoding="utf-8") for name in SCRIPTS)


def check_page_place(folder: Path, key: str) -> None:
    """Raise UserError unless a page can be written at `folder`, whose whole content it replaces: one that is absent,
    empty, or an earlier page with nothing else in it."""
    check_place(folder, key)
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if others := sorted(found - PARTS):
        raise UserError(
            f"{key}: {folder} holds {others[0]}, which a page written there would delete: name a new folder"
        )
    if found and not (folder / "data" / "page.js").is_file():
        raise UserError(f"{key}: {folder} is not empty and is no earlier page: name a new folder")


def write_page(
    folder: Path,
    table: ReportTable,
    sources: Sources,
    runs: Sequence[ShownRun],
    *,
    figures: Sequence[tuple[Drawn, Mapping[str, bytes]]] = (),
    changed: Mapping[str, Mapping[str, Any]] | None = None,
    missing: Sequence[str] = (),
) -> list[str]:
    """Write the page into `folder`, whole or not at all; return what is missing in it, a sentence each.

    figures: each with its files, as eval/report/figures.py draws them; changed: of loose runs the settings in which
    they differ. Raises UserError where a library is missing or the folder cannot be written (`check_page_place`).
    """
    check_page_place(folder, "page")
    files: dict[str, bytes | str] = {f"lib/{name}": content for name, content in libraries().items()}
    pool = _Pool()
    listed, faults = [], list(missing)
    for number, run in enumerate(runs):
        described = describe_run(run)
        tasks, said = _answer_files(number, run, pool, files)
        described["missing"] += said
        faults += [f"{run.run_id}: {fault}" for fault in described["missing"]]
        files[f"data/run-{number}.js"] = script(f"run-{number}", described)
        listed.append(
            {"id": run.run_id, "number": number, "tasks": tasks, "missing": described["missing"]}
            | {key: described[key] for key in ("base", "method", "seed")}
            | {"changed": dict((changed or {}).get(run.run_id) or {})}
        )
    files |= {f"data/{name}.js": script(name, items) for name, items in pool.files.items()}
    view = table_view(table) | {"runs": listed, "missing": faults, "noise": _noise(listed)}
    view["is_answered_once"] = _is_answered_once(listed)
    for row, shown in zip(table.spec.rows, view["rows"], strict=True):
        for column, cell in zip(table.spec.columns, shown["cells"], strict=True):
            cell["all_runs"] = runs_of(table, row, column)
    values = item_values(table, sources)
    for number, column in enumerate(view["columns"]):
        column["values"] = f"values-{number}" if column["name"] in values else None
        if column["values"]:
            files[f"data/values-{number}.js"] = script(f"values-{number}", values[column["name"]])
    drawn = list(_figures(figures, files))
    files["data/page.js"] = script("page", view)
    files["index.html"] = _render(view, drawn)
    files["page.css"] = (HERE / "static" / "page.css").read_bytes()
    files["page.js"] = own_script()
    with folder_atomic(folder) as temporary:
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return faults


_UNITS = {100.0: " points", 10.0: " on the scale to 10"}


class _Pool:
    """What was asked, a file for each list of items that some run answered; runs on the same list share it."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, list[Any]]] = {}
        self._names: dict[str, str] = {}

    def add(self, answers: Answers) -> str:
        columns = {key: [row[key] for row in answers.rows] for key in ("id", "sample", "question", "gold", "groups")}
        digest = hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()
        if digest not in self._names:
            self._names[digest] = f"items-{len(self._names)}"
            self.files[self._names[digest]] = columns
        return self._names[digest]


def _answer_files(
    number: int, run: ShownRun, pool: _Pool, files: dict[str, bytes | str]
) -> tuple[dict[str, Any], list[str]]:
    """Add a run's answers to `files`; return task → where they are, and what is missing."""
    tasks: dict[str, Any] = {}
    faults: list[str] = []
    for place, (task, entry) in enumerate(run.evaluation.items()):
        if not has_answers(task):
            continue
        answers = read_answers(run.run_path, task, entry)
        faults += [f"{task}: {fault}" for fault in answers.missing]
        if not answers.rows:
            tasks[task] = {"n": 0, "missing": answers.missing}
            continue
        name = f"answers-{number}-{place}"
        files[f"data/{name}.js"] = script(name, _columns(answers))
        tasks[task] = {
            "answers": name,
            "items": pool.add(answers),
            "n": len(answers.rows),
            "prefix": answers.rows[0]["id"].partition("/")[0],
            "missing": answers.missing,
            "metric": next(iter(answers.metrics), None),
            "samples": len({row["sample"] for row in answers.rows}),
            "spread": _spread(answers),
        }
    return tasks, faults


def _spread(answers: Answers) -> float | None:
    """Return the standard deviation of the first metric between an item's samples, each sample number scored by itself;
    None with a single sample."""
    by_sample: dict[int, list[float]] = {}
    for row in answers.rows:
        if answers.metrics and answers.metrics[0] in row["metrics"]:
            by_sample.setdefault(row["sample"], []).append(row["metrics"][answers.metrics[0]])
    return statistics.stdev(map(statistics.fmean, by_sample.values())) if len(by_sample) > 1 else None


def _noise(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence a task whose items were answered several times."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for task, files in run["tasks"].items():
            if files.get("spread") is not None:
                found.setdefault((task, files["metric"]), []).append(files["spread"])
    return [
        f"{task}, {metric}: {scale * statistics.fmean(of):.3g}{_UNITS.get(scale, '')} ({len(of)} runs)"
        for (task, metric), of in found.items()
        for scale in [shape_of(task, metric).get("scale", 100.0)]
    ]


def _is_answered_once(runs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it is known of each task of the runs that its items were answered once."""
    tasks = [files for run in runs for files in run["tasks"].values()]
    return bool(tasks) and all(files.get("samples") == 1 for files in tasks)


def _columns(answers: Answers) -> dict[str, Any]:
    """Return answers as one list a field: what all share stands once, fields that no answer has are left out."""
    rows = answers.rows
    found: dict[str, Any] = {"task": answers.task, "kind": answers.kind, "metric_names": answers.metrics}
    found["lower"] = [name for name in answers.metrics if name in LOWER]
    frame = _frame(rows)
    found["frame"] = frame
    if frame is None:
        found["prompt"] = [row["prompt"] for row in rows]
    for key in ("completion", "finish", "metrics", "extracted", "error", "judgements", "probabilities"):
        values = [row.get(key) for row in rows]
        if any(value not in (None, {}, []) for value in values):
            found[key] = values
    for key in ("invalid", "timeout", "is_graded"):
        found[key] = [int(row[key]) for row in rows]
    return found


def _frame(rows: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return (before, after) where every prompt is its question between the same two texts, else None."""
    frames = set()
    for row in rows:
        prompt, question = row["prompt"], row["question"]
        if prompt is None or question is None:
            return None
        before, found, after = prompt.partition(question)
        frames.add((before, after) if found and question else None)
    return list(frames.pop() or ()) or None if len(frames) == 1 else None


def _figures(
    figures: Sequence[tuple[Drawn, Mapping[str, bytes]]], files: dict[str, bytes | str]
) -> Iterator[dict[str, Any]]:
    for figure, made in figures:
        content = made.get("png")
        if content is not None:
            files[f"figures/{figure.name}.png"] = content
        yield {
            "name": figure.name,
            "title": figure.title,
            "caption": figure.caption,
            "missing": figure.missing,
            "is_drawn": content is not None,
        }


def _render(view: Mapping[str, Any], figures: Sequence[Mapping[str, Any]]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("index.html").render(page=view, figures=figures, policy=POLICY)
