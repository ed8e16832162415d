"""Results to tables and figures.

    python -m eval.report TABLE [allow=NAME,…] [output=DIR] [page=no] [seeds=[1,2]] [key=value …]
    python -m eval.report --runs FOLDER [FOLDER …] [output=DIR]
    python -m eval.report --inspect RUN [RUN …] [output=DIR]

TABLE is a file of configs/tables, by its name or path. `seeds` and `key=value` are those that its runs were made with
(sh scripts/reproduce.sh TABLE key=value …), since they are part of what a run is called. Written to `output`, by
default results/TABLE, and with such words, which make it another table, results/TABLE-<their hash>: table.md,
table.tex, table.csv, table.json, figures/<name>.png and .pdf, and chosen.yaml where the table chooses for another one.
Read are the runs' results, grades and logs, the table's config and results/paper_reported; no model, no GPU.

Beside them page/index.html (eval/page/): the table, its runs and every answer, in a browser without a network. --runs
makes such a page of any runs, run folders or folders that hold some, by default outputs/page; --inspect writes their
answers as logs for Inspect's viewer, by default outputs/inspect. Where something is missing in the page (answers, logs)
it is made all the same, says what, and the exit status is 3.

allow=engine,dtype admits results whose settings differ, footnoted; see eval/report/settings.py for the names.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ba_lora.config.checks import check_place
from ba_lora.errors import INCOMPLETE, CommandParser, UserError, run_entry_point
from ba_lora.experiments.options import refuse_mistyped, without_unchosen
from ba_lora.experiments.state import declaration_path, read_declaration
from ba_lora.experiments.tables import CHOSEN, find_table, load_table, report_folder
from ba_lora.io import read_object, write_bytes_atomic, write_json_atomic, write_text_atomic
from ba_lora.paths import PROJECT_ROOT, resolve_path, written_path
from ba_lora.words import read_numbers, take_options
from eval.report.figures import draw_figures
from eval.report.hypothesis_figures import chosen_settings
from eval.report.render import to_csv, to_json, to_latex, to_markdown
from eval.report.settings import check_allowed
from eval.report.sheets import Drawn
from eval.report.sources import Sources, read_failures, read_paper, read_results
from eval.report.spec import TableSpec, table_spec
from eval.report.table import ReportTable, build_table

OPTIONS = ("allow", "output", "page", "seeds")


def main() -> int:
    parser = CommandParser(
        prog="python -m eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", metavar="TABLE", help="a file of configs/tables")
    parser.add_argument("--runs", nargs="+", metavar="FOLDER", help="runs of no table: only a page")
    parser.add_argument("--inspect", nargs="+", metavar="RUN", help="logs for Inspect's viewer")
    parser.add_argument("words", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    asked = [name for name in ("table", "runs", "inspect") if getattr(options, name)]
    if asked == ["runs"] or asked == ["inspect"]:
        return _of_runs(asked[0], getattr(options, asked[0]), options.words)
    if len(asked) != 1 or "=" in options.table:
        raise UserError("give a TABLE, or --runs FOLDER …, or --inspect RUN …; see python -m eval.report --help")
    return _of_table(options.table, options.words)


def _of_runs(kind: str, words: Sequence[str], more: Sequence[str]) -> int:
    """Write the page, or the logs, of any runs; return the exit status."""
    from eval.page.build import check_page_place

    runs, output = runs_and_output(f"--{kind}", [*words, *more])
    if kind == "inspect":
        from eval.page.inspect_logs import write_logs

        output = output or PROJECT_ROOT / "outputs" / "inspect"
        check_place(output, "output")
        logs, missing = write_logs(runs, output)
        for path in logs:
            print(f"log: {path}")
        return _tell_missing("the logs", missing)
    output = output or PROJECT_ROOT / "outputs" / "page"
    check_page_place(output, "output")
    return loose_page(runs, output)


def runs_and_output(command: str, words: Sequence[str]) -> tuple[list[Path], Path | None]:
    """Return the runs that the words of a command name, and the folder of output=DIR, absolute."""
    from eval.page.loose import find_runs

    own, folders = take_options(words, ("output",))
    if wrong := [word for word in folders if "=" in word]:
        raise UserError(f"{command} takes folders and output=DIR, not {wrong[0]}")
    output = written_path(own["output"]) if own.get("output") else None
    return find_runs([resolve_path(folder) for folder in folders]), output


def loose_page(runs: Sequence[Path], output: Path) -> int:
    """Write the page of runs that stand in no table; return the exit status."""
    from eval.page.build import write_page
    from eval.page.loose import table_of_runs

    made = table_of_runs(runs)
    missing = write_page(output, made.table, made.sources, made.shown, changed=made.changed, missing=made.missing)
    return _told(output, missing)


def _told(page: Path, missing: Sequence[str]) -> int:
    status = _tell_missing("the page", missing)
    print(f"page: {page / 'index.html'}")
    return status


def _tell_missing(place: str, missing: Sequence[str]) -> int:
    """Name the first ten things that are missing; return the exit status."""
    for line in missing[:10]:
        print(f"missing in {place}: {line}", file=sys.stderr)
    if len(missing) > 10:
        print(f"missing in {place}: {len(missing) - 10} things more", file=sys.stderr)
    return INCOMPLETE if missing else 0


def _of_table(name: str, words: Sequence[str]) -> int:
    """Write a table's report and its page; return the exit status."""
    own, overrides = take_options(words, OPTIONS, example="allow=engine")
    refuse_mistyped(overrides, OPTIONS)
    if own.get("page", "yes") not in ("yes", "no"):
        raise UserError(f"page={own['page']}: yes or no is needed")
    chosen = written_path(own["output"]) if own.get("output") else None
    if chosen:
        check_place(chosen, "output")
    allow = tuple(own["allow"].split(",")) if own.get("allow") else ()
    check_allowed(allow)
    seeds = read_numbers("seeds", own["seeds"]) if "seeds" in own else None
    resolved, unchosen = without_unchosen(load_table(find_table(name), overrides=overrides, seeds=seeds))
    for line in unchosen:
        print(f"note: {line}", file=sys.stderr)
    spec = table_spec(resolved)
    made_with = [*overrides, *([f"seeds={','.join(map(str, seeds))}"] if seeds else [])]
    folder = report_folder(spec.name, made_with)
    output = chosen or folder
    check_place(output, "output")
    if own.get("page") != "no":
        from eval.page.build import check_page_place, shown_runs, write_page

        check_page_place(output / "page", "output")
    command = " ".join(["sh scripts/reproduce.sh", name, *made_with])
    declared = read_declaration(declaration_path(folder, chosen))
    sources = read_sources(spec, command=command, declared=declared)
    table = build_table(spec, sources, allow=allow)
    drawn = write_report(table, sources, output)
    for figure, _ in drawn:
        if figure.missing:
            print(f"note: figure {figure.name} is not drawn: {figure.missing}", file=sys.stderr)
    print((output / "table.md").read_text(encoding="utf-8"))
    print(f"report: {output}")
    if own.get("page") == "no":
        return 0
    return _told(
        output / "page", write_page(output / "page", table, sources, shown_runs(table, sources), figures=drawn)
    )


def read_sources(spec: TableSpec, *, command: str, declared: Mapping[str, Any] | None = None) -> Sources:
    """Read the results and the paper's numbers. Raises UserError, naming `command`, where no run has a result."""
    runs = spec.all_runs()
    results, hashes = read_results(runs)
    if not results:
        raise UserError(f"table {spec.name} has no result yet: make them with: {command}")
    return Sources(results, read_paper(spec.paper, renamed=spec.names), hashes, read_failures(runs), declared)


def write_report(table: ReportTable, sources: Sources, folder: Path) -> list[tuple[Drawn, dict[str, bytes]]]:
    """Write the table's files and figures, each atomically and none before all are made; return the figures and files.

    What an earlier report was made from (logs, features, grades) may lie on another machine. Its figure that cannot be
    drawn stays, and its caption says so; a report that would lose tests raises UserError.
    """
    drawn = [(_with_earlier(figure, folder), files) for figure, files in draw_figures(table, sources)]
    figures = [figure for figure, _ in drawn]
    facts = to_json(table, figures)
    chosen = chosen_settings(table)
    _refuse_lost_tests(facts, folder / "table.json")
    texts = {"tex": to_latex(table), "csv": to_csv(table), "md": to_markdown(table, figures)}
    for figure, files in drawn:
        for suffix, content in files.items():
            write_bytes_atomic(folder / "figures" / f"{figure.name}.{suffix}", content)
    write_json_atomic(folder / "table.json", facts)
    if table.spec.choose and not chosen:
        (folder / CHOSEN).unlink(missing_ok=True)  # an earlier report's, of other trials
    if chosen:
        write_text_atomic(folder / CHOSEN, "".join(f"{name}: {json.dumps(words)}\n" for name, words in chosen.items()))
    for suffix, text in texts.items():
        write_text_atomic(folder / f"table.{suffix}", text)
    return drawn


def _with_earlier(figure: Drawn, folder: Path) -> Drawn:
    """Return a figure, with a word on the file of an earlier report where it was not drawn now."""
    name = f"figures/{figure.name}.png"
    if figure.missing is None or not (folder / name).is_file():
        return figure
    return dataclasses.replace(figure, missing=f"{figure.missing}; {name} is an earlier report's")


def _refuse_lost_tests(facts: Mapping[str, Any], path: Path) -> None:
    """Raise UserError where tests whose items the earlier report knew have no grades any more."""

    def chosen(report: Mapping[str, Any], found: Callable[[Any], bool]) -> set[str]:
        tests = [([c["column"], c["focus"], c["other"]], c) for c in report["comparisons"]]
        tests += [(h["hypothesis"]["name"], h) for h in report.get("hypotheses", []) if h["low"] is not None]
        return {json.dumps(name) for name, test in tests if found(test)}

    earlier = read_object(path)
    if earlier is None or earlier.get("statistics") != facts["statistics"]:  # tests of another kind are no loss
        return
    lost = chosen(earlier, lambda c: c["num_items"] is not None) & chosen(facts, lambda c: c["num_items"] is None)
    if lost:
        raise UserError(
            f"{path} has {len(lost)} tests whose grades are not at hand here: bring the runs' outputs along, or "
            "write elsewhere with output=DIR"
        )


if __name__ == "__main__":
    run_entry_point(main)
