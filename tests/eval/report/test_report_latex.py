"""The report's LaTeX: it says what the table says, and pdflatex sets it, within the page, whatever a table holds."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ba_lora.experiments.tables import TABLES_PATH, Row, load_table
from eval.report.columns import ReportColumn
from eval.report.render import escape_latex, to_latex
from eval.report.sheets import main_sheet, panels
from eval.report.sources import Sources, read_paper
from eval.report.spec import table_spec
from eval.report.table import build_table
from tests.support.report_world import SEEDS, World, build

TABLE_FILES = sorted(TABLES_PATH.glob("*.yaml"))
TOO_WIDE_PT = 10.0  # what TeX calls overfull and the eye does not see


@pytest.fixture
def known(tmp_path) -> World:
    world = World(tmp_path)
    world.fill()
    return world


def set_in_latex(text: str, folder: Path) -> None:
    """Set a table with pdflatex; fail where that fails, and where the table leaves the page. Skip without pdflatex."""
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex: apt install texlive-latex-base")
    (folder / "table.tex").write_text(text, encoding="utf-8")
    (folder / "main.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs,graphicx,longtable}\n"
        "\\begin{document}\\input{table.tex}\\end{document}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"],
        cwd=folder, capture_output=True, text=True, errors="replace", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert (folder / "main.pdf").stat().st_size > 10_000
    log = done.stdout.replace("\n", "")
    assert "Float too large" not in log
    assert [width for width in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log) if float(width) > TOO_WIDE_PT] == []


def test_latex_is_balanced_and_says_the_same(known):
    text = to_latex(build(known, labels={"lora": "LoRA & 100% _x_"}))
    for name in ("table", "tabular", "minipage", "longtable"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 1
    assert text.count("{") == text.count("}")
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0].strip().splitlines()
    assert (
        len(body) == 6 and {line.count(" & ") for line in body} == {8} and all(line.endswith("\\\\") for line in body)
    )
    assert "LoRA \\& 100\\% \\_x\\_ & 33.33 $\\pm$ 5.77 (3) & 34.33 $\\pm$ 0.50 & $-$1.00" in text
    assert "\\underline{66.67 $\\pm$ 5.77 (3)}" in text and "\\underline{3.0 $\\pm$ 0.0 (3)}" in text
    assert "failed\\textsuperscript{b}" in text and "−" not in text and "±" not in text


def test_what_latex_does_not_know_becomes_its_code_point():
    assert escape_latex("a_b\\c 5%") == "a\\_b\\textbackslash{}c 5\\%"
    assert escape_latex("é “λ”\n\x1b│") == "é “$\\lambda$” [U+001B][U+2502]"


def test_a_wide_table_is_cut_between_groups(known):
    sheet = main_sheet(build(known))
    parts = panels(sheet, widest=4)
    assert [[width for _, width in part.groups] for part in parts] == [[2, 3, 1], [2, 3]]
    for number, row in enumerate(sheet.rows):
        assert [text for part in parts for text in part.rows[number][2:]] == list(row[2:])
        assert all(part.rows[number][:2] == row[:2] for part in parts)
    assert panels(sheet, widest=7) == [sheet]
    assert len(panels(sheet, widest=1)) == 3  # a group is never broken


def test_a_table_of_every_kind_of_cell_is_set(known, tmp_path):
    note = "λ ≥ 0 … ~ ^ \\ {} <sup> 5 % of #1 & more, “é”\x1b[31m │ 誤\n\n▁"
    set_in_latex(to_latex(build(known, note=note)), tmp_path)


@pytest.mark.parametrize(("num_settings", "num_columns"), [(20, 2), (2, 17)], ids=["tall", "wide"])
def test_a_table_that_is_larger_than_a_page_is_set(known, tmp_path, num_settings, num_columns):
    """Names as the table files have them, and comparisons over several pages."""
    settings = [f"regularizers.lambda_consistency={number}" for number in range(num_settings)]
    rows = [Row("tiny", method, setting) for method in ("lora", "ba_lora") for setting in settings]
    columns = tuple(
        ReportColumn(
            f"c{number}", "MNLI → MNLI-mm (Matthews)", task="gsm8k", metric="strict", paper=("gsm8k", "accuracy")
        )
        for number in range(num_columns)
    )
    runs = {}
    for row in rows:
        planned = tuple(known.add(row.method, seed, setting=row.setting) for seed in SEEDS)
        runs |= {(row, column.name): planned for column in columns}
    paper = "".join(f"known,tiny,lora,{setting},gsm8k,accuracy,30,1.5,somewhere\n" for setting in settings)
    (known.folder / "paper" / "known.csv").write_text(
        f"table,model,method,setting,task,metric,mean,std,source\n{paper}"
    )
    labels = {"ba_lora": "PiSSA + all three (BA-LoRA)", "lora": "LoRA, initialised by a Gaussian"}
    table = build(
        known, rows=tuple(rows), columns=columns, runs=runs, labels=labels, compare_within=("base", "setting")
    )
    assert len(table.comparisons) == num_settings * num_columns
    set_in_latex(to_latex(table), tmp_path)


@pytest.mark.slow  # a thousand configs are resolved
@pytest.mark.parametrize("path", TABLE_FILES, ids=[path.stem for path in TABLE_FILES])
def test_every_table_file_makes_a_report(path, tmp_path):
    """Without a result; one seed stands for all, each is resolved by itself."""
    spec = table_spec(load_table(path, seeds=[1]))
    assert spec.all_runs()
    table = build_table(spec, Sources({}, read_paper(spec.paper, renamed=spec.names)))
    assert {cell.status for cell in table.cells.values()} == {"missing"}
    set_in_latex(to_latex(table), tmp_path)
