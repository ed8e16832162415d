"""A table from made-up results with known answers, compared whole; what may not stand side by side; broken input."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest

from ba_lora.config.layers import load_config
from ba_lora.config.schema import UNTUNED
from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from ba_lora.io import read_json, write_jsonl_atomic
from eval.report.block import parse_report
from eval.report.columns import Items, ReportColumn, metric_value, why_missing
from eval.report.comparisons import as_declared
from eval.report.declared import Collapse, Primary
from eval.report.hypothesis_figures import chosen_settings
from eval.report.render import escape_markdown, to_csv, to_json, to_markdown
from eval.report.settings import FAULTS, NEVER_ALLOWED, SETTINGS, Used
from eval.report.sheets import format_number, legend, letter, probability, signed
from eval.report.sources import Sources, read_paper
from eval.report.spec import PlannedRun, planned_comparisons, setting_value
from eval.report.table import build_table
from eval.report.verdict import verdict
from tests.support.report_world import SEEDS, World, build

WHOLE = """\
# A known table

- Evidence: 15 of 18 runs, 2 to 3 seeds a method, so no test (it takes 5), only 95 % intervals over seeds and items.
- Ahead by an uncorrected interval, which decides nothing: 1 of 4 comparisons (BA-LoRA over lora in Average (+17.2)).
- Behind by an uncorrected interval, which decides nothing: none of 4 comparisons.
- Open: 3 of 4 comparisons, all 2 of BA-LoRA against Full FT, all 1 of BA-LoRA against PiSSA.
- Best GSM8K: Full FT 70.00.

| model | method | GSM8K (%) ↑: ours (n) | paper | Δ | Average ↑: ours (n) | time (h) ↓: ours (n) | paper | Δ |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| tiny | Full FT | **70.00 ± 0.00 (2)**<sup>a</sup> |  |  | **36.5 ± 0.0 (2)**<sup>a</sup> \
| *3.0 ± 0.0 (2)*<sup>a</sup> | &gt; 24.0 |  |
| tiny | lora | 33.33 ± 5.77 (3) | 34.33 ± 0.50 | −1.00 | 17.7 ± 2.9 (3) | **2.0 ± 0.0 (3)** |  |  |
| tiny | dora | failed<sup>b</sup> |  |  | failed<sup>b</sup> | failed<sup>b</sup> |  |  |
| tiny | loha |  |  |  |  |  |  |  |
| tiny | PiSSA | *66.67 ± 5.77 (3)* |  |  | *34.8 ± 2.9 (3)* | *3.0 ± 0.0 (3)* |  |  |
| tiny | BA-LoRA | *66.67 ± 5.77 (3)* | 66.17 | +0.50 | *34.8 ± 2.9 (3)* | *3.0 ± 0.0 (3)* |  |  |

Ours: mean ± standard deviation (n − 1) over n seeds; blank: no result. **Bold**: best, *italic*: second best of one \
model, the untuned model aside.

Paper: paper, table 1; paper, text. Δ: ours − paper.

time: measured on 2 CPU thread(s) (11 runs). Times are by the wall clock; whether other runs shared the machine \
meanwhile is not recorded.

<sup>a</sup> 1 of 3 runs oom: OutOfMemoryError: CUDA out of memory\x20\x20
<sup>b</sup> 3 of 3 runs failed: ValueError: no such layer

## Comparisons

| column | rows | against | difference | by seed | 95 % interval | p | p, corrected | items |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
| GSM8K | tiny, BA-LoRA | tiny, Full FT | −3.33 | 1: 0.00, 2: 0.00 | −107.08 … +100.41 |  |  | 10 |
| GSM8K | tiny, BA-LoRA | tiny, lora | +33.33 | 1: +40.00, 2: +40.00, 3: +20.00 | no spread |  |  | 10 |
| GSM8K | tiny, BA-LoRA | tiny, PiSSA | 0.00 | 1: 0.00, 2: 0.00, 3: 0.00 | no spread |  |  | 10 |
| Average | tiny, BA-LoRA | tiny, Full FT | −1.7 | 1: 0.0, 2: 0.0 | −8.8 … +5.5 (time: no mean over items) \
|  |  |  |
| Average | tiny, BA-LoRA | tiny, lora | +17.2 | 1: +20.5, 2: +20.5, 3: +10.5 \
| +10.6 … +23.7 (time: no mean over items) |  |  |  |
| Average | tiny, BA-LoRA | tiny, PiSSA | 0.0 | 1: 0.0, 2: 0.0, 3: 0.0 \
| −6.5 … +6.5 (time: no mean over items) |  |  |  |

Difference of the means over seeds, rows − against; by seed: of the two runs with that seed. Interval and p: a t-test \
with seeds and items both as random effects (docs/statistics.md). They tell how far the difference would move with \
other seeds and other test items. Where a reason stands in brackets the items are not known: the interval is over \
seeds only (t over seeds), and says nothing of other items. With fewer than 5 seeds there are intervals and no tests.

## Also reported by the paper

- tiny ba_lora mbpp, pass@1: 12.5 ± 0.25 (paper, table 1)

## Where it comes from

- 15 of 18 runs have a result; `table.json` lists them with the hash of each file.
- commit c0ffeec0ffee: 15 runs
"""


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


@pytest.fixture
def known(world):
    world.fill()
    return world


def test_the_known_table_whole(known):
    assert to_markdown(build(known)) == WHOLE


def test_csv_and_json_say_the_same(known):
    table = build(known)
    lines = {(row["method"], row["column"]): row for row in csv.DictReader(io.StringIO(to_csv(table)))}
    lora = lines["lora", "gsm8k"]
    assert [lora[key] for key in ("status", "n", "planned", "seeds", "values")] == ["ok", "3", "3", "1 2 3", "30 30 40"]
    assert (float(lora["mean"]), float(lora["difference"])) == pytest.approx((100 / 3, 100 / 3 - 34.33))
    assert lines["dora", "gsm8k"]["status"] == "failed" and lines["loha", "gsm8k"]["status"] == "missing"
    assert lines["full_ft", "hours"]["paper_is_bound"] == "True" and lines["full_ft", "hours"]["difference"] == ""

    plain = json.loads(json.dumps(to_json(table), allow_nan=False))
    assert len(plain["cells"]) == len(lines) == 18
    compared = {one["other"]["method"]: one for one in plain["comparisons"] if one["column"] == "gsm8k"}
    assert [compared[name]["num_items"] for name in ("full_ft", "lora", "pissa")] == [10, 10, 10]
    assert compared["lora"]["untested"] == "no spread" and compared["lora"]["p"] is None
    assert plain["verdict"][0].startswith("Evidence: 15 of 18 runs") and len(plain["verdict"]) == 5
    assert len(plain["runs"]) == 15 and all(len(run["result_sha256"]) == 64 for run in plain["runs"])
    assert plain["also_reported"][0]["value"]["mean"] == 12.5


def test_whoever_was_trained_is_ranked_with_any_number_of_seeds(world):
    """A smaller n is told; the untuned model takes no place, although it has the best time of all."""
    for seed in SEEDS:
        world.add("lora", seed)
    world.add("ba_lora", 1)
    world.add(UNTUNED, 1, grades=[1.0] * 10)
    rows = tuple(Row("tiny", method) for method in (UNTUNED, "lora", "ba_lora"))
    for seeds in (SEEDS, (1,)):
        runs = {(row, "gsm8k"): tuple(world.run(row.method, seed) for seed in seeds) for row in rows}
        runs[rows[0], "gsm8k"] = runs[rows[0], "gsm8k"][:1]
        column = ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict")
        table = build(world, rows=rows, columns=(column,), runs=runs, paper=())
        cells = [table.cell(row, column) for row in rows]
        assert [cell.mark for cell in cells] == ["", "second", "best"]
        told = [[table.footnotes[note] for note in cell.notes] for cell in cells]
        assert told == ([[], [], ["1 seed where others have 3"]] if seeds == SEEDS else [[], [], []])


@pytest.mark.parametrize(
    ("pairs", "tested"),
    [
        ((("ba_lora", "lora"),), [("ba_lora rank=1", "lora rank=1"), ("ba_lora rank=2", "lora rank=2")]),
        ((("ba_lora", "full_ft"),), [("ba_lora rank=1", "full_ft"), ("ba_lora rank=2", "full_ft")]),
        ((("rank=2", "rank=1"),), [("lora rank=2", "lora rank=1"), ("ba_lora rank=2", "ba_lora rank=1")]),
        ((), [(f"ba_lora rank={one}", two) for one in (1, 2) for two in ("full_ft", "lora rank=1", "lora rank=2")]),
    ],
)
def test_a_table_can_name_what_it_compares(world, pairs, tested):
    """Two methods in one setting, two settings with one method; without names, all of its own with all others."""
    rows = (
        Row("tiny", "full_ft"),
        *(Row("tiny", method, f"rank={n}") for method in ("lora", "ba_lora") for n in (1, 2)),
    )
    column = ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict")
    spec = world.spec(rows=rows, columns=(column,), runs={}, compare=pairs)
    planned = [
        (f"{a.method} {a.setting}".strip(), f"{b.method} {b.setting}".strip())
        for _, a, b in planned_comparisons(spec, rows)
    ]
    assert planned == tested


def five_seeds(world, solved_by, **changes):
    """Build a table of methods with five seeds; solved_by: method → how many of 20 items each seed solves."""
    rows = tuple(Row("tiny", method) for method in solved_by)
    runs = {
        (row, "gsm8k"): tuple(
            world.add(row.method, seed, grades=[float((item + 7 * seed) % 20 < count) for item in range(20)])
            for seed, count in enumerate(solved_by[row.method])
        )
        for row in rows
    }
    column = ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict")
    return build(world, **{"rows": rows, "columns": (column,), "runs": runs, "paper": ()} | changes)


def test_with_five_seeds_there_are_tests_and_their_corrected_p_is_marked(world):
    solved = {"lora": (3, 4, 3, 4, 3), "pissa": (16, 17, 18, 17, 16), "ba_lora": (17, 18, 17, 16, 18)}
    table = five_seeds(world, solved)
    found = {one.other.method: one for one in table.comparisons}
    assert found["lora"].is_significant and found["lora"].sign == 1 and found["lora"].untested is None
    assert not found["pissa"].is_significant and found["pissa"].sign == 0
    ps = [found[name].p for name in ("lora", "pissa")]
    assert [found[name].p_adjusted for name in ("lora", "pissa")] == pytest.approx([2 * ps[0], ps[1]])
    text = to_markdown(table)
    shown = probability(found["lora"].p_adjusted).replace("<", "&lt;")
    assert f"**{shown}**" in text and "2 exploratory tests, corrected by Benjamini and Hochberg" in text
    assert "Ahead by a corrected test: 1 of 2 comparisons (BA-LoRA over lora in GSM8K (+69.00))." in text
    three = tuple(world.run("pissa", seed) for seed in (0, 1, 2))
    rows = [Row("tiny", method) for method in ("lora", "pissa", "ba_lora")]
    runs = {(row, "gsm8k"): tuple(world.run(row.method, seed) for seed in range(5)) for row in rows}
    few = five_seeds(world, solved | {"pissa": (3, 4, 3, 4, 3)}, runs=runs | {(rows[1], "gsm8k"): three})
    (found,) = [one for one in few.comparisons if one.other.method == "pissa"]
    assert found.p is None and found.sign == 1  # an interval alone decides nothing beside a test
    _, ahead, _, undecided, _ = verdict(few)
    assert ahead.startswith("Ahead by a corrected test: 1 of 2 comparisons (BA-LoRA over lora")
    assert undecided == "Open: 1 of 2 comparisons, all 1 of BA-LoRA against PiSSA."
    four = {method: counts[:4] for method, counts in solved.items()}
    assert all(one.p is None and one.untested == "4 seeds, 5 are needed" for one in five_seeds(world, four).comparisons)


def test_primary_tests_have_a_correction_of_their_own(world):
    """Holm over all that were declared, also those that cannot be made yet; the others are exploratory."""
    solved = {"lora": (12, 15, 10, 14, 11), "pissa": (15, 17, 14, 17, 16), "ba_lora": (17, 18, 17, 16, 18)}
    primary = (Primary("gsm8k", "ba_lora", "lora"),)
    table = five_seeds(world, solved, primary=primary, num_primary=3)
    found = {one.other.method: one for one in table.comparisons}
    assert [found[name].family for name in ("lora", "pissa")] == ["primary", "exploratory"]
    assert found["lora"].p_adjusted == pytest.approx(3 * found["lora"].p)
    assert found["pissa"].p_adjusted == pytest.approx(found["pissa"].p)
    text = to_markdown(table)
    assert "1 primary tests, corrected by Holm over 3; 1 exploratory tests" in text
    assert text.index("| GSM8K (primary) | tiny, BA-LoRA | tiny, lora") < text.index("| GSM8K | tiny, BA-LoRA")


def test_runs_of_one_seed_are_pairs_only_where_that_is_declared(world):
    """A seed that moves both alike cancels in pairs; what the seed moves must be the same in both."""
    solved = {"lora": (2, 6, 10, 14, 18), "ba_lora": (4, 8, 12, 16, 20)}
    unpaired, paired = (five_seeds(world, solved, paired=paired).comparisons[0] for paired in (False, True))
    assert unpaired.difference == paired.difference == 10.0
    assert unpaired.sign == 0 and paired.sign == 1 and paired.high - paired.low < (unpaired.high - unpaired.low) / 3
    lora, pissa, again = (
        PlannedRun(method, 1, Path(f"{method}.json"), Path(method), load_config("configs/nlg/toy.yaml", method=method))
        for method in ("lora", "pissa", "ba_lora")
    )
    rows = [Row("tiny", method) for method in ("lora", "pissa", "ba_lora")]
    runs = {(row, "gsm8k"): (run,) for row, run in zip(rows, (lora, pissa, again), strict=True)}
    spec = world.spec(rows=tuple(rows), runs=runs, paired=True)
    assert [spec.is_paired(rows[2], other) for other in rows] == [False, True, True]
    line = (
        "The seed moves: order of the rows, initialisation of the adapter (lora); order of the rows (PiSSA, BA-LoRA)."
    )
    assert any(text.startswith(line) for text in legend(build_table(spec, Sources({}))))


def test_collapsed_runs_are_counted_beside_the_mean_of_the_others(known):
    """LoRA's third run solves 4 of 10, the others 3: with a bound of 35 two of three have collapsed."""
    rule = Collapse("gsm8k", below=35, columns=("gsm8k",))
    table = build(known, collapsed=rule)
    cell = table.cells[Row("tiny", "lora"), "gsm8k"]
    assert (cell.values, cell.seeds, cell.num_collapsed, cell.num_planned) == ((40.0,), (3,), 2, 3)
    assert [table.footnotes[note] for note in cell.notes] == ["2 of 3 runs collapsed: GSM8K below 35"]
    text = to_markdown(table)
    assert "| tiny | lora | 40.00 (1; 2 of 3 collapsed)<sup>b</sup> |" in text
    assert "Collapsed: runs whose GSM8K is below 35." in text and "Collapsed runs: 2 of 3 lora." in text
    assert table.cells[Row("tiny", "lora"), "hours"].seeds == SEEDS  # a column that the rule does not name
    [against_lora] = [one for one in table.comparisons if (one.column, one.other.method) == ("gsm8k", "lora")]
    assert (against_lora.untested, against_lora.low) == ("a single seed", None)
    table = build(known, collapsed=Collapse("gsm8k", above=99))
    assert not any(cell.num_collapsed for cell in table.cells.values())
    table = build(known, collapsed=Collapse("gsm8k", below=99, columns=("gsm8k",)))
    assert table.cells[Row("tiny", "lora"), "gsm8k"].status == "collapsed"


TESTS = {"rows": [["tiny", "lora", ""]], "seeds": [1, 2], "report": {"primary": ["…"], "paired": False}}
RECORD = {"sha256": "s1", "tests": TESTS, "num_results": 0, "declared_at": "2026-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    ("record", "told", "is_primary"),
    [
        (None, "what it was when the first run started is not recorded; its primary tests count as exploratory", False),
        (
            {},
            "the same as when the first run started (2026-01-01T00:00:00+00:00); its primary tests are as declared, "
            "not testable with 3 seeds (5 are needed).",
            True,
        ),
        (
            {"sha256": "s0"},
            "s0 when the first run started (2026-01-01T00:00:00+00:00): the file was changed since; its primary tests "
            "are as declared",
            True,
        ),
        ({"num_results": 3}, "3 results were there before: no test is primary", False),
        (
            {"tests": {}},
            "what decides its tests was changed (report, rows, seeds): all tests count as exploratory",
            False,
        ),
        ({"tests": TESTS | {"seeds": [1]}}, "what decides its tests was changed (seeds)", False),
        ({"tests": TESTS | {"report": {"primary": ["…"], "paired": True}}}, "was changed (report)", False),
    ],
)
def test_a_family_counts_only_as_it_was_before_the_first_run(world, record, told, is_primary):
    primary = (Primary("gsm8k", "ba_lora", "lora"),)
    spec = world.spec(primary=primary, num_primary=1, sha256="s1", deciding=TESTS)
    declared = None if record is None else RECORD | record
    found, sentence = as_declared(spec, declared)
    assert told in sentence and sentence.startswith("The table's file has the sha256 s1")
    assert (found.primary, found.num_primary) == ((primary, 1) if is_primary else ((), 0))


@pytest.mark.parametrize(("number", "told"), [(0, "+00:00)."), (6, "+00:00); 6 results were there before.")])
def test_results_before_the_declaration_are_told_where_no_test_is_primary(world, number, told):
    record = RECORD | {"tests": {"report": {}}, "num_results": number}
    assert as_declared(world.spec(sha256="s1"), record)[1].endswith(told)


def test_no_html_no_link_and_no_new_line_comes_into_the_markdown(known):
    """From labels, notes, errors and the paper's file alike."""
    bad = "<img src=x onerror=alert(1)>[a](javascript:b)|\n# c"
    known.edit(known.run("dora", 1), error=bad)
    labels = {"lora": bad, "gsm8k": bad, "tiny": bad}
    text = to_markdown(build(known, labels=labels, title=bad, note=bad, source=bad))
    assert "<img" not in text and "](javascript" not in text and "\n# c" not in text
    assert text.count("&lt;img") > 10
    assert escape_markdown("a < b & c | d") == "a &lt; b &amp; c \\| d"


def test_settings_are_blocks_of_their_own(world):
    rows = [Row("tiny", method, setting) for setting in ("rank=1", "rank=2") for method in ("lora", "ba_lora")]
    columns = (ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict"),)
    for row in rows:
        for seed in SEEDS:
            world.add(row.method, seed, setting=row.setting)
    runs = {(row, "gsm8k"): tuple(world.run(row.method, seed, setting=row.setting) for seed in SEEDS) for row in rows}
    table = build(world, rows=tuple(rows), columns=columns, runs=runs, compare_within=("base", "setting"))
    assert [table.cells[row, "gsm8k"].mark for row in rows] == ["second", "best", "second", "best"]
    assert [(one.focus.setting, one.other.setting) for one in table.comparisons] == [
        ("rank=1", "rank=1"), ("rank=2", "rank=2"),
    ]  # fmt: skip
    together = build(world, rows=tuple(rows), columns=columns, runs=runs)
    assert [together.cells[row, "gsm8k"].mark for row in rows] == ["", "best", "", "best"]  # two share the first place
    assert len(together.comparisons) == 4
    assert "second best of one model, the untuned" in to_markdown(together)
    rest = build(world, rows=tuple(rows), columns=columns, runs=runs, compare_within=())
    assert [rest.cells[row, "gsm8k"].mark for row in rows] == ["", "best", "", "best"]
    assert "second best of the table, the untuned" in to_markdown(rest)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("task_version", "evaluation/gsm8k/version", "0"),
        ("test_data", "evaluation/gsm8k/data_sha256", {"hub": "other"}),
        ("prompt", "evaluation/gsm8k/prompt_hash", "p2"),
        ("template", "evaluation/gsm8k/generation/template", "chat"),
        ("engine", "evaluation/gsm8k/generation/engine", "vllm"),
        ("engine_version", "evaluation/gsm8k/generation/engine_version", "2"),
        ("dtype", "evaluation/gsm8k/generation/dtype", "bfloat16"),
        ("sampling", "evaluation/gsm8k/generation/sampling", {"temperature": 0.8}),
        ("grader", "evaluation/gsm8k/packages", {"math-verify": "0.1"}),
        ("grader", "evaluation/gsm8k/choices", {"setup": "false"}),
        ("grader", "evaluation/gsm8k/sandbox", {"limits": {"cpu_s": 9.0}}),
        ("shots", "evaluation/gsm8k/shots", 5),
        ("limit", "evaluation/gsm8k/generation/limit", 5),
        ("harness", "evaluation/gsm8k/generation/harness", "0.4.12"),
        ("training_data", "data/sha256", "d2"),
        ("training_data", "data/rows_used", 99),
        ("training_prompt", "prompt_hash", "p2"),
        ("model_revision", "model/revision", "r2"),
        ("model_dtype", "config/model/dtype", "bfloat16"),
        ("quantization", "config/model/quantization", "nf4"),
        ("hardware", "environment/hardware", {"cpu": "y"}),
        ("partial", "evaluation/gsm8k/partial", True),
        ("stale", "evaluation/gsm8k/stale", "the completions have changed since"),
    ],
)
def test_a_setting_that_differs_is_refused_or_footnoted(known, name, path, value):
    odd = known.run("lora", 2)
    known.edit(odd, **{path: value})
    with pytest.raises(UserError, match=name) as refused:
        build(known)
    assert odd.run_id in str(refused.value) and "allow=" in str(refused.value) and "\n" not in str(refused.value)
    # An old grader's version also makes a score stale.
    table = build(known, allow=[name, "stale"] if name == "task_version" else [name])
    cell = table.cells[Row("tiny", "lora"), "hours" if name == "hardware" else "gsm8k"]
    assert any(table.footnotes[note].startswith(f"{name}: ") for note in cell.notes)
    others = [table.cells[Row("tiny", method), "gsm8k"] for method in ("pissa", "ba_lora")]
    assert not any(cell.notes for cell in others)


def test_scores_of_the_same_first_items_stand_side_by_side_with_a_footnote(known):
    """All runs have one eval.limit; where one has another, or none, the table is refused."""
    partial = {"evaluation/gsm8k/partial": True, "evaluation/gsm8k/num_missing": 5}
    finished = [run for run in known.spec().all_runs() if run.result_path.is_file()]
    finished = [run for run in finished if json.loads(run.result_path.read_text())["evaluation"]]
    for run in finished:
        known.edit(run, **partial, **{"config/eval": {"limit": 10}})
    table = build(known)
    assert "partial: the first 10 items (eval.limit), 5 left out" in table.footnotes
    known.edit(finished[0], **{"config/eval": {"limit": 11}})
    with pytest.raises(UserError, match="gsm8k is partial: the first 1. items"):
        build(known)
    known.edit(finished[0], **{"config/eval": {"limit": 10}, "evaluation/gsm8k/num_missing": 6})  # one more is gone
    with pytest.raises(UserError, match="gsm8k is partial"):
        build(known)
    known.edit(finished[0], **partial)
    for run in finished:  # a score that tells its limit: one of its own is no eval.limit
        known.edit(run, **{"evaluation/gsm8k/generation/limit": 9})
    with pytest.raises(UserError, match="gsm8k is partial: 5 items missing"):
        build(known)
    for run in finished:
        known.edit(run, **{"evaluation/gsm8k/generation/limit": 10})
    assert build(known).footnotes == table.footnotes


def test_every_setting_is_tried_above():
    mark = next(mark for mark in test_a_setting_that_differs_is_refused_or_footnoted.pytestmark)
    assert {case[0] for case in mark.args[1]} == set(SETTINGS) - set(NEVER_ALLOWED) - {"evaluated_otherwise"}


def test_scores_of_another_evaluation_than_the_tables_are_told():
    """Runs keep their names whatever eval.options are, so another table's words may have scored them."""
    config = load_config("toy", overrides=["eval.options.temperature=0.0", "eval.options.serve=merged"])
    run = PlannedRun("lora", 1, Path("r.json"), Path("r"), config)
    found = {"serve": "hot", "temperature": 0.8}
    result = {"evaluation": {"toy": {"generation": {"engine": "hf"}}}, "config": {"eval": {"options": found}}}
    used = Used(Row("toy", "lora"), run, ReportColumn("toy", "toy", task="toy", metric="strict"), result)
    assert FAULTS["evaluated_otherwise"](used) == "eval.options.temperature is 0.8, the table has 0.0"
    found["temperature"] = 0.0
    assert FAULTS["evaluated_otherwise"](used) is None


def test_two_judges_never_stand_in_one_table(known):
    odd = known.run("lora", 2)
    known.edit(odd, **{"evaluation/gsm8k/judge": {"id": "gpt-9"}})
    known.edit(odd, **{"evaluation/gsm8k/partial": True})
    with pytest.raises(
        UserError, match="judge differs in column .*gpt-9.*two judges never stand in one table"
    ) as refused:
        build(known)
    assert odd.run_id in str(refused.value) and "allow=" not in str(refused.value)
    with pytest.raises(UserError, match="allow=judge: ratings of two judges"):
        build(known, allow=["judge", "partial"])


def test_rows_that_are_compared_must_be_trained_alike(world):
    """Also where their settings differ; rows of another block may be trained on other data."""
    rows = (Row("tiny", "lora"), Row("tiny", "ba_lora", "top_k=5"))
    runs = {(row, "gsm8k"): (world.run(row.method, 1, setting=row.setting),) for row in rows}
    columns = (ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict"),)
    world.add("lora", 1)
    world.add("ba_lora", 1, setting="top_k=5", **{"data/sha256": "d2"})
    with pytest.raises(UserError, match="training_data differs"):
        build(world, rows=rows, columns=columns, runs=runs)
    table = build(world, rows=rows, columns=columns, runs=runs, compare_within=("base", "setting"))
    assert table.comparisons == ()


def test_the_hubs_commit_stands_for_rows_that_were_not_hashed(world):
    """As NLU reads them: two commits are two training sets."""
    for seed, commit in zip(SEEDS, ("c1", "c1", "c2"), strict=True):
        world.add("lora", seed, **{"data/sha256": None, "data/revision": commit})
    with pytest.raises(UserError, match=r'training_data differs .*"c1", 100.*"c2", 100'):
        build(world)
    world.add("lora", SEEDS[2], **{"data/sha256": None, "data/revision": "c1"})
    build(world)


def test_an_unknown_setting_is_told_with_the_nearest(known):
    with pytest.raises(UserError, match="allow=engin is no setting.*nearest: engine"):
        build(known, allow=["engin"])


def test_what_the_config_allows_is_allowed(known):
    """In the whole table, or only in one column."""
    known.edit(known.run("lora", 2), **{"evaluation/gsm8k/generation/engine": "vllm"})
    assert "engine: vllm" in build(known, config_allows=("engine",)).footnotes
    gsm8k, *others = known.spec().columns
    again = dataclasses.replace(gsm8k, name="again")
    runs = {(row, "again" if name == "gsm8k" else name): runs for (row, name), runs in known.spec().runs.items()}
    columns = (dataclasses.replace(gsm8k, allow=("engine",)), again, *others)
    assert "engine: vllm" in build(known, columns=(columns[0], *others)).footnotes
    with pytest.raises(UserError, match="engine differs in column again"):
        build(known, columns=columns, runs=runs | dict(known.spec().runs))
    with pytest.raises(UserError, match="allow=engin is no setting"):
        build(known, columns=(dataclasses.replace(gsm8k, allow=("engin",)), *others))


@pytest.mark.parametrize("change", ["absent", "other items", "other grades", "no metric"])
def test_a_test_without_fit_grades_is_blank_and_says_why(known, change):
    grades = known.run("lora", 2).run_path / "grades" / "gsm8k.jsonl"
    rows = [json.loads(line) for line in grades.read_text().splitlines()]
    wanted = {
        "absent": "no grades at hand",
        "other items": "other items",
        "other grades": "grades are not those of the score",
        "no metric": "no grades at hand",
    }[change]
    if change == "absent":
        grades.unlink()
    else:
        rows[0] |= {"task_id": "gsm8k/99"} if change == "other items" else {}
        rows[0]["metrics"] = {} if change == "no metric" else rows[0]["metrics"]
        if change == "other grades":
            rows[0]["metrics"]["strict"] = 1.0 - rows[0]["metrics"]["strict"]
        write_jsonl_atomic(grades, rows)
    tests = {one.other.method: one for one in build(known).comparisons if one.column == "gsm8k"}
    assert (tests["lora"].untested, tests["lora"].num_items, tests["lora"].p) == (wanted, None, None)
    assert tests["lora"].low < tests["lora"].difference < tests["lora"].high  # over the seeds
    assert tests["pissa"].num_items == 10


def test_several_samples_of_an_item_are_averaged(known):
    run = known.run("lora", 1)
    rows = [json.loads(line) for line in (run.run_path / "grades" / "gsm8k.jsonl").read_text().splitlines()]
    twice = [{**row, "sample": sample, "metrics": {"strict": float(sample)}} for row in rows for sample in (0, 1)]
    write_jsonl_atomic(run.run_path / "grades" / "gsm8k.jsonl", twice)
    spec = known.spec()
    grades = known.sources(spec).grades(run, Items("gsm8k", "strict"))
    assert grades == {f"gsm8k/{item}": (0.5, 1) for item in range(10)}


def test_of_seeds_that_are_too_few_the_legend_tells_only_where_a_comparison_has_them(world):
    """Five seeds that are all alike are no test for another reason."""
    flat = five_seeds(world, {"lora": (0,) * 5, "ba_lora": (20,) * 5})
    assert [one.untested for one in flat.comparisons] == ["no spread"] and "With fewer than" not in to_markdown(flat)
    few = five_seeds(world, {"lora": (3, 4, 3), "ba_lora": (17, 18, 17)})
    assert "With fewer than 5 seeds there are intervals" in to_markdown(few)


def test_both_turns_of_a_question_are_one_item(known):
    run = known.run("lora", 1)
    rows = [{"task_id": f"mt_bench/81/turn{turn}", "metrics": {"rating": 4.0 + turn}} for turn in (1, 2)]
    write_jsonl_atomic(run.run_path / "grades" / "mt_bench.jsonl", rows)
    grades = known.sources(known.spec()).grades(run, Items("mt_bench", "rating"))
    assert grades == {"mt_bench/81": (11.0, 2)}


def test_the_terms_gradients_are_told_where_they_were_measured(known):
    assert "gradient" not in to_markdown(build(known))
    for seed, share in zip(SEEDS, (0.01, 0.02, 0.03), strict=True):
        known.edit(known.run("ba_lora", seed), **{"training/gradient_shares": {"svd": share}})
    assert "in shares of the task's: BA-LoRA: svd 2 %." in to_markdown(build(known))


def test_the_terms_gradients_are_told_of_each_setting_where_they_differ(world):
    shares = {"x.a=1.5 y base=1": 0.0, "x.a=1.5 y base=2": 0.02, "b y": 0.9, "c y base=1": 1e-9, "d y base=1": 0.01}
    rows = tuple(Row("tiny", method, setting) for method in ("lora", "ba_lora") for setting in shares)
    runs = {}
    for row in rows:
        share = shares[row.setting] if row.method == "ba_lora" else 0.1
        changes = {"training/gradient_shares": {"svd": share}}
        runs[row, "gsm8k"] = (world.add(row.method, 1, setting=row.setting.replace(" ", "_"), **changes),)
    columns = (ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict"),)
    table = build(world, rows=rows, columns=columns, runs=runs, clusters="base", labels={"b y": "B"})
    [line] = [line for line in legend(table) if "gradient" in line]
    assert line.endswith(
        "task's: lora: svd 10 %; ba_lora (a=1.5, d): svd 1 %; ba_lora (B): svd 90 %; ba_lora (c): svd < 0.001 %."
    )


def test_the_pre_trained_models_are_told_by_their_weights(world):
    """A name whose weights were others in one run has a footnote."""
    rows = tuple(Row("tiny", method, f"base={number}") for method in ("lora", "ba_lora") for number in (1, 2))
    runs = {}
    for row in rows:
        other = (row.method, row.setting) == ("ba_lora", "base=2")
        likelihood = {"task": "likelihood", "base_sha256": f"{row.setting[-1]}{'f' if other else 'e'}" * 32}
        changes = {"evaluation/likelihood": likelihood, "config/model/name": f"bases/b{row.setting[-1]}"}
        runs[row, "gsm8k"] = (world.add(row.method, 1, setting=row.setting, **changes),)
    columns = (ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict"),)
    table = build(world, rows=rows, columns=columns, runs=runs, clusters="base")
    text = to_markdown(table)
    assert f"weights' sha256: b1 {'1e' * 6}, b2 {'2e' * 6} or {'2f' * 6}" in text
    assert to_json(table)["bases"] == {"bases/b1": ["1e" * 32], "bases/b2": ["2e" * 32, "2f" * 32]}
    assert table.footnotes == (
        f"bases/b2 had different weights: sha256 {'2e' * 6} in 1 runs, sha256 {'2f' * 6} in 1 runs",
    )
    assert {row.setting for row in rows if table.cell(row, columns[0]).notes} == {"base=2"}
    assert "bases" not in to_json(build(world, rows=(), columns=(), runs={}))


def test_a_group_of_items_is_tested_by_its_own_grades(known, monkeypatch):
    """Items 0 to 3 are "rare": there lora has 1, 1, 2 right in its three seeds and ba_lora the other ones."""
    for method in ("lora", "ba_lora"):
        for seed in SEEDS:
            run = known.run(method, seed)
            path = run.run_path / "grades" / "gsm8k.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for number_, row in enumerate(rows):
                row["groups"] = {"family": "age" if number_ < 2 else "rate" if number_ < 4 else "add"}
            write_jsonl_atomic(path, rows)
            grades = [row["metrics"]["strict"] for row in rows]
            families = {
                name: {"n": 2, "metrics": {"strict": sum(grades[start : start + 2]) / 2}}
                for name, start in (("age", 0), ("rate", 2))
            }
            known.edit(run, **{"evaluation/gsm8k/groups": {"family": families}})
    rows = (Row("tiny", "lora"), Row("tiny", "ba_lora"))
    column = ReportColumn("rare", "rare", task="gsm8k", metric="groups.family.{age,rate}.metrics.strict")
    runs = {(row, "rare"): tuple(known.run(row.method, seed) for seed in SEEDS) for row in rows}
    table = build(known, rows=rows, columns=(column,), runs=runs)
    assert table.cells[rows[0], "rare"].mean == pytest.approx(100 * (1 + 1 + 2) / 12)
    [test] = table.comparisons
    assert (test.untested, test.num_items, len(test.seeds)) == ("no spread", 4, 3)
    assert test.difference == pytest.approx(100 / 3)
    known.add("lora", 2, **{"evaluation/gsm8k/groups": {"family": families}})  # grades without groups
    assert build(known, rows=rows, columns=(column,), runs=runs).comparisons[0].untested == "no grades at hand"
    monkeypatch.setattr("eval.report.verdict.LEAST_SEEDS", 3)  # so that it is not for the seeds
    (evidence, *_) = verdict(build(known, rows=rows, columns=(column,), runs=runs))
    assert "3 seeds a method, so no test (no grades at hand), only 95 % intervals over seeds alone" in evidence


@pytest.mark.parametrize(
    ("task", "metric", "items"),
    [
        ("toy", "strict", Items("toy", "strict")),
        ("toy", "groups.family.age.metrics.strict", Items("toy", "strict", "family", ("age",))),
        ("toy", "groups.family.{age, rate}.metrics.pass@1", Items("toy", "pass@1", "family", ("age", "rate"))),
        ("toy", "ratings.overall", None),
        ("toy", "metrics.{f1,acc}", None),
        (None, "training.seconds", None),
        (None, "seconds", None),
    ],
)
def test_which_items_a_column_is_the_mean_of(task, metric, items):
    assert ReportColumn("x", "x", task=task, metric=metric).items == items


def test_a_failed_run_never_counts_although_it_has_scores(known):
    known.edit(known.run("lora", 2), status="cancelled", error=None)
    table = build(known)
    cell = table.cells[Row("tiny", "lora"), "gsm8k"]
    assert cell.seeds == (1, 3) and table.footnotes[cell.notes[0]] == "1 of 3 runs cancelled: no error was written"


@pytest.mark.parametrize("undefined", [(2,), SEEDS])
def test_a_run_whose_metric_is_undefined_says_why(known, undefined):
    """Its seed is left out of the mean, of the mean over columns too, and never without a word."""
    for seed in undefined:
        run = known.run("lora", seed)
        known.edit(run, **{"evaluation/gsm8k/metrics": {"strict": None}})
        known.edit(run, **{"evaluation/gsm8k/notes": {"strict": "undefined: all 10 labels are of class 0"}})
    table = build(known)
    cell = table.cells[Row("tiny", "lora"), "gsm8k"]
    assert cell.seeds == tuple(sorted(set(SEEDS) - set(undefined)))
    assert cell.status == ("ok" if cell.seeds else "undefined")
    text = f"{len(undefined)} of 3 runs undefined: all 10 labels are of class 0"
    for column in ("gsm8k", "average"):
        cell = table.cells[Row("tiny", "lora"), column]
        assert [table.footnotes[note] for note in cell.notes] == [text]
    assert not table.cells[Row("tiny", "lora"), "hours"].notes
    assert ("undefined<sup>b</sup>" in to_markdown(table)) == (undefined == SEEDS)


@pytest.mark.parametrize(
    ("changes", "task", "metric", "reason"),
    [
        ({"evaluation": {"cola": {"notes": {"matthews": "undefined: all alike"}}}}, "cola", "matthews",
         ("undefined", "all alike")),
        ({"evaluation": {"mnli": {"notes": {"minority_recall": "no such row"}}}}, "mnli", "per_class.minority_recall",
         ("undefined", "no such row")),
        ({"evaluation": {"cola": {"metrics": {}}}}, "cola", "perplexity.after",
         ("unmeasured", "its score has no perplexity.after")),
        ({"evaluation": {}}, "cola", "matthews", None),  # not evaluated yet
        ({}, None, "training.seconds", ("unmeasured", "the run gave no seconds")),
        ({"training": {"seconds": None, "resumed_from": "checkpoint-9"}}, None, "training.seconds",
         ("unmeasured", "the training was resumed from checkpoint-9")),
        ({}, None, "training.last_log.svd", None),  # a method without the term
        ({"training": None}, None, "training.seconds", None),  # nothing was trained
    ],
)  # fmt: skip
def test_why_a_run_has_no_value(changes, task, metric, reason):
    made = {"training": {"seconds": None, "last_log": {"loss": 1.0}}, "evaluation": {}} | changes
    assert why_missing(made, ReportColumn("x", "x", task=task, metric=metric)) == reason


def test_a_resumed_runs_time_is_unmeasured_not_undefined(known):
    known.edit(known.run("lora", 2), training={"seconds": None, "resumed_from": "checkpoint-9"})
    table = build(known)
    cell = table.cells[Row("tiny", "lora"), "hours"]
    assert cell.seeds == (1, 3) and [failure.status for failure in cell.failures] == ["unmeasured"]
    assert table.footnotes[cell.notes[0]] == "1 of 3 runs unmeasured: the training was resumed from checkpoint-9"


MEMORY = {
    "training.peak_memory_mb": "peak: the most that one process held at once.",
    "training.total_peak_memory_mb": "peak: the sum of the processes' peaks, which need not fall together.",
}


@pytest.mark.parametrize("metric", MEMORY)
def test_the_legend_tells_what_memory_is_and_on_what_it_was_measured(known, metric):
    row = Row("tiny", "lora")
    for seed in SEEDS:
        run = known.run("lora", seed)
        known.edit(run, **{f"training/{metric.partition('.')[2]}": 7.0})
        if seed == 3:
            known.edit(run, **{"environment/cpu_model": "Some CPU"})
    column = ReportColumn("peak", "peak", metric=metric, unit="MiB", scale=1.0, better="lower")
    runs = {(row, "peak"): tuple(known.run("lora", seed) for seed in SEEDS)}
    text = to_markdown(build(known, rows=(row,), columns=(column,), runs=runs, paper=()))
    assert "peak: measured on 2 CPU thread(s) (2 runs), 2 CPU thread(s) of Some CPU (1 run)." in text
    assert [sentence in text for sentence in MEMORY.values()] == [name == metric for name in MEMORY]
    assert "resident since it began, the SVDs of an initialisation included." in text


def test_broken_results_are_named(known):
    path = known.run("lora", 1).result_path
    good = json.loads(path.read_text())
    path.write_text('{"status": ')
    with pytest.raises(UserError, match="tiny-lora-s1.json, line 1: not valid JSON"):
        build(known)
    for broken in ([1], {**good, "status": "done"}):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="tiny-lora-s1.json is no result"):
            build(known)
    path.write_text(json.dumps({**good, "seed": 7}))
    with pytest.raises(UserError, match="tiny-lora-s1.json is another run than its name says: seed is 7, not 1"):
        build(known)


def test_paper_files_that_are_missing_broken_or_doubled(known):
    folder = known.folder / "paper"
    with pytest.raises(UserError, match="knwon.csv.*nearest: known"):
        read_paper(["knwon"], folder=folder)
    text = (folder / "known.csv").read_text()
    (folder / "known.csv").write_text(text.replace("34.33", "about 34"))
    with pytest.raises(UserError, match="known.csv, line 2: could not convert"):
        read_paper(["known"], folder=folder)
    (folder / "known.csv").write_text(text.replace("mean,std", "mean"))
    with pytest.raises(UserError, match="its columns must be"):
        read_paper(["known"], folder=folder)
    (folder / "known.csv").write_text(text + text.splitlines()[1])
    with pytest.raises(UserError, match="known.csv has 2 values for tiny lora gsm8k"):
        build(known)


def test_of_several_paper_files_the_first_counts(known):
    """Two versions of the paper report the same cells."""
    folder = known.folder / "paper"
    text = (folder / "known.csv").read_text()
    (folder / "later.csv").write_text(text.replace("known,", "later,").replace("34.33", "99.99"))
    for files, value in ((("known", "later"), 34.33), (("later", "known"), 99.99)):
        assert build(known, paper=files).cells[Row("tiny", "lora"), "gsm8k"].paper.mean == value


def test_the_papers_names_are_turned_into_ours(known):
    lines = read_paper(["known"], renamed={"tiny": "llama", "lora": "lora_gaussian"}, folder=known.folder / "paper")
    assert [line.row for line in lines[:2]] == [Row("llama", "lora_gaussian"), Row("llama", "ba_lora")]


def test_every_paper_file_is_read(root):
    names = sorted(path.stem for path in (root / "results" / "paper_reported").glob("*.csv"))
    assert len(names) >= 14
    lines = read_paper(names)
    assert len(lines) > 500 and sum(line.value.is_bound for line in lines) == 2
    assert all(line.table == name for name in names for line in read_paper([name]))


ENTRY = {
    "metrics": {"strict": 0.5, "f1": 0.7, "acc": 0.9},
    "groups": {"family": {"a": {"n": 30, "metrics": {"strict": 0.2}}, "b": {"n": 10, "metrics": {"strict": 1.0}}}},
    "ratings": {"overall": 6.5},
}


@pytest.mark.parametrize(
    ("task", "metric", "wanted"),
    [
        ("toy", "strict", 0.5),
        ("toy", "ratings.overall", 6.5),
        ("toy", "metrics.{f1,acc}", 0.8),
        ("toy", "groups.family.{a, b}.metrics.strict", 0.4),  # (30 · 0.2 + 10 · 1) / 40
        ("toy", "groups.family.{a,c}.metrics.strict", None),
        ("toy", "groups", None),
        ("gone", "strict", None),
        (None, "training.seconds", 12.0),
        (None, "training.resumed", None),
    ],
)
def test_metric_paths(task, metric, wanted):
    made = {"evaluation": {"toy": ENTRY}, "training": {"seconds": 12, "resumed": True}}
    value = metric_value(made, ReportColumn("x", "x", task=task, metric=metric))
    assert value == (wanted if wanted is None else pytest.approx(wanted))


def test_setting_values():
    assert setting_value("rank=8", "rank") == setting_value("adapter.rank=8 vllm", "rank") == 8
    assert setting_value("a=1, regularizers.lambda_svd=1e-4", "lambda_svd") == 1e-4
    assert setting_value("", "rank") is None and setting_value("rank=all", "rank") is None
    assert setting_value("low_rank=3", "rank") is None


ROWS = [Row("tiny", "lora", "rank=1"), Row("tiny", "ba_lora", "rank=1"), Row("tiny", "ba_lora", "rank=2")]


def test_report_blocks_are_checked():
    columns = [ReportColumn("gsm8k", "GSM8K")]
    good = {
        "columns": {"gsm8k": {"scale": "1e-6", "decimals": 0, "allow": ["engine"]}},
        "figures": {"a": {"kind": "dots", "columns": ["gsm8k"]}},
    }
    values = parse_report(good, rows=ROWS, columns=columns, source="t")
    assert (values["columns"][0].scale, values["columns"][0].decimals) == (1e-6, 0)
    assert values["columns"][0].allow == ("engine",)
    assert values["figures"][0].kind == "dots"
    wrong = {
        "unknown key colums": {"colums": {}},
        "nearest: gsm8k": {"columns": {"gsm8": {}}},
        "decimals must be": {"columns": {"gsm8k": {"decimals": -1}}},
        "scale: big: a number is needed": {"columns": {"gsm8k": {"scale": "big"}}},
        "scale must be above 0, found 0": {"columns": {"gsm8k": {"scale": 0}}},
        "scale: nan: a finite number is needed": {"columns": {"gsm8k": {"scale": "nan"}}},
        "compare_within=method is unknown: choose one of base, setting": {"compare_within": ["method"]},
        "allow: dtype: a list, each a word, is needed": {"allow": "dtype"},
        "kind=pie is unknown": {"figures": {"a": {"kind": "pie"}}},
        "needs columns and x": {"figures": {"a": {"kind": "lines"}}},
        "figure a: unknown key colour": {"figures": {"a": {"kind": "dots", "columns": ["gsm8k"], "colour": "red"}}},
        "primary: .*: a list is needed": {"primary": {"column": "gsm8k"}},
        "primary: against and focus is missing": {"primary": [{"column": "gsm8k"}]},
        "primary: column=gsm9k is unknown": {"primary": [{"column": "gsm9k", "focus": "lora", "against": "ba_lora"}]},
        "primary: focus=dora is unknown": {"primary": [{"column": "gsm8k", "focus": "dora", "against": "ba_lora"}]},
        "paired: yes please: true or false is needed": {"paired": "yes please"},
        "collapsed: below or above is needed": {"collapsed": {"column": "gsm8k"}},
        "collapsed: below: low: a number is needed": {"collapsed": {"column": "gsm8k", "below": "low"}},
        "name becomes a file's": {"figures": {"../a": {"kind": "dots", "columns": ["gsm8k"]}}},
        "column=gsm9k is unknown": {"figures": {"a": {"kind": "dots", "columns": ["gsm9k"]}}},
        "figure a: terms=svdd is unknown.*nearest: svd": {
            "figures": {"a": {"kind": "training", "terms": ["loss (nats)", "svdd"]}}
        },
        "figures: .*: a mapping is needed": {"figures": ["dots"]},
        r"compare must be a list of pairs, \[\[a, b\], …\], found \('lora',\)": {"compare": ["lora"]},
        "compare=lorra is unknown.*nearest: lora": {"compare": [["ba_lora", "lorra"]]},
        "compare=lora is unknown .*: choose one of rank=1, rank=2": {"compare": [["rank=1", "lora"]]},
    }
    for message, block in wrong.items():
        with pytest.raises(UserError, match=message):
            parse_report(block, rows=ROWS, columns=columns, source="t")


def test_numbers_as_they_are_written():
    assert [format_number(-0.001, 2), format_number(-1.5, 1), format_number(None, 1), format_number(3.0, 0)] == [
        "0.00",
        "−1.5",
        "",
        "3",
    ]
    assert [signed(0.5, 1), signed(-0.5, 1), signed(0.001, 1), signed(None, 2)] == ["+0.5", "−0.5", "0.0", ""]
    assert [letter(0), letter(25), letter(26), letter(53)] == ["a", "z", "aa", "bb"]


def test_a_choice_by_a_mean_of_columns_counts_what_has_ended_part_by_part(world):
    """A run that has failed in one part only, or in each for another reason, has ended; one that is yet to be scored
    in a part has not."""
    rates = ("trainer.learning_rate=1", "trainer.learning_rate=2")
    rows = [Row("tiny", method, rate) for method in ("lora", "ba_lora") for rate in rates]
    parts = [ReportColumn(name, name, task="gsm8k", metric=name) for name in ("strict", "flexible")]
    columns = (*parts, ReportColumn("mean", "mean", mean_of=("strict", "flexible")))
    runs = {}
    for row in rows:
        for seed in SEEDS:
            run = world.add(row.method, seed, setting=row.setting)
            world.edit(run, **{"evaluation/gsm8k/metrics/flexible": 0.5})
        for part in parts:
            runs[row, part.name] = tuple(world.run(row.method, seed, setting=row.setting) for seed in SEEDS)
    first, second, _ = runs[rows[0], "strict"]

    def chosen():
        table = build(world, rows=tuple(rows), columns=columns, runs=runs, paper=(), choose="mean")
        return {row.method for row in table.compared}

    undefined = {"strict": "undefined: no row", "flexible": "undefined: no other row"}
    world.edit(first, **{"evaluation/gsm8k/metrics": {}, "evaluation/gsm8k/notes": undefined})
    assert chosen() == {"lora", "ba_lora"}
    second_entry = read_json(second.result_path)["evaluation"]["gsm8k"]
    world.edit(second, **{"evaluation": {"other": second_entry}})  # not yet scored
    assert chosen() == {"ba_lora"}


def test_of_each_method_the_best_setting_by_the_chosen_column_is_compared(world):
    """LoRA's grid has its best inside, BA-LoRA's at its edge; only these two are ranked and tested."""
    rates = ("trainer.learning_rate=1", "trainer.learning_rate=2", "trainer.learning_rate=3")
    shares = {"lora": (0.2, 0.5, 0.4), "ba_lora": (0.3, 0.4, 0.6)}
    rows, runs = [], {}
    for method, values in shares.items():
        for rate, share in zip(rates, values, strict=True):
            row = Row("tiny", method, rate)
            rows.append(row)
            grades = [float(item < share * 10) for item in range(10)]
            runs[row, "gsm8k"] = tuple(world.add(method, seed, setting=rate, grades=grades) for seed in SEEDS)
            runs[row, "judged"] = runs[row, "gsm8k"]
    column, judged = (ReportColumn(name, name, task="gsm8k", metric="strict") for name in ("gsm8k", "judged"))

    def built():
        return build(world, rows=tuple(rows), columns=(column, judged), runs=runs, paper=(), choose="gsm8k")

    table = built()
    lora, best = Row("tiny", "lora", "trainer.learning_rate=2"), Row("tiny", "ba_lora", "trainer.learning_rate=3")
    assert [(one.column, one.focus, one.other) for one in table.comparisons] == [("judged", best, lora)]
    assert chosen_settings(table) == {"lora": ["trainer.learning_rate=2"], "ba_lora": ["trainer.learning_rate=3"]}
    marks = {(row, one.name): mark for row in rows for one in (column, judged) if (mark := table.cell(row, one).mark)}
    assert marks == {(best, "judged"): "best", (lora, "judged"): "second"}  # the column of the choice flatters it

    def texts(row):
        return [table.footnotes[note] for note in table.cell(row, column).notes]

    assert texts(lora) == ["chosen by gsm8k of 3 settings"]
    assert texts(best) == ["chosen by gsm8k of 3 settings, at an edge of what was tried: try further"]
    assert not any(texts(row) for row in rows if row not in (lora, best))

    world.edit(runs[best, "gsm8k"][0], status="failed", error="diverged")
    table = built()  # tried, but not with every seed: another one is chosen, of the same budget
    assert texts(Row("tiny", "ba_lora", "trainer.learning_rate=2")) == [
        "chosen by gsm8k of 3 settings, of which 1 failed"
    ]
    runs[lora, "gsm8k"][0].result_path.unlink()
    table = built()  # not tried yet: no choice
    assert texts(Row("tiny", "lora", "trainer.learning_rate=1")) == ["not chosen yet: 2 of 3 settings have all seeds"]
    assert set(chosen_settings(table)) == {"ba_lora"}
    assert not table.comparisons and not any(cell.mark for cell in table.cells.values())
    with pytest.raises(UserError, match="report.choose=gsm9k is unknown"):
        parse_report({"choose": "gsm9k"}, rows=rows, columns=[column], source="table x")
    for wrong, told in (
        ([Row("tiny", "lora", "lr=1")], "the setting lr=1 is no config key=value"),
        ([Row("tiny", "lora"), Row("small", "lora")], "the rows have several bases"),
    ):
        with pytest.raises(UserError, match=told):
            parse_report({"choose": "gsm8k"}, rows=wrong, columns=[column], source="table x")
