"""`python -m eval.report` on a table file: the files that it writes, and its errors in one line."""

import dataclasses
import hashlib
import json
import sys

import pytest
import yaml

from ba_lora.config.schema import UNTUNED
from ba_lora.errors import INCOMPLETE, UserError
from ba_lora.experiments import state as grid_state
from ba_lora.experiments import tables
from ba_lora.experiments.tables import load_table, report_folder
from ba_lora.io import write_json_atomic
from eval.report.__main__ import _refuse_lost_tests, main
from eval.report.columns import ReportColumn
from eval.report.sources import FailedStage, read_results
from eval.report.spec import table_spec
from eval.tasks import get_task
from tests.support.report_world import changed, result


@pytest.fixture
def table_path(tmp_path):
    """A table of two methods and two seeds on the toy, its results in a folder of its own."""
    table = {
        "title": "Two methods",
        "kind": "nlg",
        "seeds": [1, 2],
        "overrides": [f"results_dir={tmp_path / 'runs'}", "data.num_rows=17"],  # no run of outputs/ has this name
        "rows": [{"bases": ["toy"], "methods": ["lora", "ba_lora"]}],
        "columns": {
            "strict": {"task": "toy", "metric": "strict"},
            "seconds": {"metric": "training.seconds", "unit": "s", "better": "lower"},
        },
        "labels": {"lora": "LoRA", "ba_lora": "BA-LoRA", "strict": "Toy"},
        "report": {
            "columns": {"seconds": {"decimals": 0}},
            "figures": {
                "accuracy": {"kind": "dots", "columns": ["strict"]},
                "loss": {"kind": "training", "terms": ["loss"]},
            },
        },
    }
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    return path


@pytest.fixture
def report(monkeypatch, tmp_path):
    def run(*words: object) -> int:
        words = ("page=no", *map(str, words), f"output={tmp_path / 'report'}")
        monkeypatch.setattr(sys, "argv", ["eval.report", words[1], words[0], *words[2:]])
        return main()

    return run


def fill(table_path) -> None:
    for cell in load_table(table_path).cells:
        config = cell.config
        made = result(config.method, config.seed, run_id=config.result_path.stem, grades=None, base=config.name)
        made["config"] = dataclasses.asdict(config)
        made["evaluation"]["toy"] = {
            "task": "toy",
            "version": get_task("toy").version,
            "metrics": {"strict": 0.5 + config.seed / 100},
            "n": 400,
        }
        made["training"]["seconds"] = 100.0 + config.seed
        if config.method == UNTUNED:  # nothing was trained
            made |= {
                "model": {"name": "tiny"},
                "data": None,
                "training": None,
                "environment": None,
                "prompt_hash": None,
            }
        write_json_atomic(config.result_path, made)


def test_every_file_is_written_and_the_same_results_give_the_same_bytes(table_path, report, tmp_path, capsys):
    fill(table_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "notes.md").write_text("somebody's")
    assert report(table_path, "page=yes") == INCOMPLETE  # its page has no answers
    folder = tmp_path / "report"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sorted(name for name in files if not name.startswith("page/")) == [
        "figures/accuracy.pdf", "figures/accuracy.png", "notes.md",
        "table.csv", "table.json", "table.md", "table.tex",
    ]  # fmt: skip
    printed = capsys.readouterr()
    assert "| toy | BA-LoRA | 51.50 ± 0.71 (2) | 102 ± 1 (2) |" in printed.out
    assert "no grades at hand" in printed.out and f"report: {folder}" in printed.out
    assert "note: figure loss is not drawn: no run's log.jsonl is at hand" in printed.err
    assert "not drawn, no run's log.jsonl is at hand." in printed.out
    assert len(json.loads(files["table.json"])["runs"]) == 4
    assert "page/index.html" in files and "missing in the page: " in printed.err
    assert report(table_path, "seeds=[2]") == 0
    assert "52.00 (1)" in capsys.readouterr().out
    report(table_path, "page=yes")
    assert all((folder / name).read_bytes() == content for name, content in files.items())


def test_a_figure_whose_logs_are_not_at_hand_keeps_its_file(table_path, report, tmp_path, capsys):
    fill(table_path)
    earlier = tmp_path / "report" / "figures" / "loss.png"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"of an earlier report")
    report(table_path)
    assert earlier.read_bytes() == b"of an earlier report"
    told = "not drawn, no run's log.jsonl is at hand; figures/loss.png is an earlier report's."
    assert told in capsys.readouterr().out


def test_a_table_with_other_words_has_another_folder(table_path, monkeypatch, tmp_path, capsys):
    """The report of the table as configured is only ever written for the table as configured."""
    fill(table_path)
    monkeypatch.setattr(tables, "RESULTS_PATH", tmp_path / "results")
    for words, wanted in (([], "two"), (["seeds=[2]"], f"two-{hashlib.sha256(b'seeds=2').hexdigest()[:8]}")):
        monkeypatch.setattr(sys, "argv", ["eval.report", str(table_path), *words])
        assert main() == INCOMPLETE
        assert f"\nreport: {tmp_path / 'results' / wanted}\n" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results" / "two" / "table.json").read_text())["runs"]) == 4
    assert report_folder("two", ["a=1", "b=2"]) == report_folder("two", ["b=2", "a=1"]) != report_folder("two", [])


def test_the_untuned_model_is_the_same_for_any_seeds(table_path, report, capsys):
    """It has one result, made with whichever seed came first."""
    table = yaml.safe_load(table_path.read_text())
    table["rows"][0]["methods"].insert(0, "untuned")
    table_path.write_text(yaml.safe_dump(table, sort_keys=False))
    fill(table_path)
    report(table_path, "seeds=[2]")
    assert "| toy | not tuned | 51.00 (1) |" in capsys.readouterr().out


def test_a_table_without_results_names_the_command(table_path, report, tmp_path):
    with pytest.raises(
        UserError, match=f"no result yet: make them with: sh scripts/reproduce.sh {table_path} data.num_rows=3 seeds=7"
    ):
        report(table_path, "data.num_rows=3", "seeds=7")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("method", "path", "value", "message"),
    [
        ("lora", "config/trainer/learning_rate", 1.0, "trainer.learning_rate 1.0 → 0.002"),
        ("lora", "config/trainer/max_steps", 3, "trainer.max_steps 3 → None"),
        ("lora", "config/adapter/rank", 3, "adapter.rank 3 → 8"),
        ("lora", "config/data/num_rows", 3, "data.num_rows 3 → 17"),
        ("lora", "config/model/name", "elsewhere", "model.name elsewhere → data/toy/clean"),
        ("lora", "config/colour", "red", "colour: Key 'colour' not in 'NLGConfig'"),
        ("lora", "base", "llama", "base is llama, not toy"),
        (UNTUNED, "config/model/name", "elsewhere", "model.name elsewhere → data/toy/clean"),
        ("lora", "config/trainer/logging_steps", 3, None),  # changes no weight
        (UNTUNED, "config/data/num_rows", 3, None),  # nothing was trained
    ],
)
def test_a_result_that_was_trained_otherwise_is_refused(table_path, method, path, value, message):
    """Its name, its method and its seed are those that are asked for."""
    table = yaml.safe_load(table_path.read_text())
    table["rows"][0]["methods"] = [UNTUNED, "lora"]
    table_path.write_text(yaml.safe_dump(table, sort_keys=False))
    fill(table_path)
    runs = table_spec(load_table(table_path)).all_runs()
    run = next(run for run in runs if run.method == method)
    write_json_atomic(run.result_path, changed(json.loads(run.result_path.read_text()), {path: value}))
    if message is None:
        assert len(read_results(runs)[0]) == 3
    else:
        with pytest.raises(
            UserError, match=f"{run.run_id}.json is another run than its name says: {message}"
        ) as refused:
            read_results(runs)
        assert "\n" not in str(refused.value)


def test_a_failed_evaluation_says_so(table_path, report, tmp_path, monkeypatch, capsys):
    """The training has ended well, and the result says no more than that."""
    fill(table_path)
    monkeypatch.setattr(grid_state, "GRID_PATH", tmp_path / "grid")
    for cell in load_table(table_path).cells:
        made = json.loads(cell.config.result_path.read_text())
        if cell.config.method == "lora":
            made["evaluation"] = {}
            error = "the judge is not reachable"
            record = {"stage": "score toy", "error": error, "log": "score-toy.log", "tasks": {"toy": error}}
            write_json_atomic(grid_state.failure_path(cell.config.run_path), record)
            write_json_atomic(cell.config.result_path, made)
    report(table_path)
    printed = capsys.readouterr().out
    assert "| toy | LoRA | failed<sup>a</sup> | 102 ± 1 (2) |" in printed  # its time is known
    assert "2 of 2 runs failed: toy: the judge is not reachable" in printed


def test_a_failed_re_evaluation_is_told_beside_the_older_value(table_path, report, tmp_path, monkeypatch, capsys):
    fill(table_path)
    monkeypatch.setattr(grid_state, "GRID_PATH", tmp_path / "grid")
    [first, *_] = load_table(table_path).cells
    record = {"stage": "score toy", "error": "no sandbox", "log": "score-toy.log"}
    write_json_atomic(grid_state.failure_path(first.config.run_path), record)
    report(table_path)
    printed = capsys.readouterr().out
    assert "| toy | LoRA | 51.50 ± 0.71 (2)<sup>a</sup> | 102 ± 1 (2) |" in printed
    assert "<sup>a</sup> 1 of 2 runs with an older value: its re-evaluation failed: score toy: no sandbox" in printed


@pytest.mark.parametrize(
    "damaged",
    ["", '{"stage": "train", "er', "[]", '{"error": "a", "log": "b"}', '{"stage": "train", "error": null, "log": "b"}']
    + [f'{{"stage": "score toy", "error": "a", "log": "b", "tasks": {tasks}}}' for tasks in ('["toy"]', '{"toy": 1}')],
)
def test_a_damaged_record_of_a_failure_tells_nothing(table_path, report, tmp_path, monkeypatch, capsys, damaged):
    """Neither the report nor the grid ends by it."""
    monkeypatch.setattr(grid_state, "GRID_PATH", tmp_path / "grid")
    (tmp_path / "grid").mkdir()
    [first, *_] = load_table(table_path).specs()
    path = grid_state.failure_path(first.config.run_path)
    path.write_text(damaged)
    assert grid_state.inspect(first, {}).status == grid_state.MISSING
    fill(table_path)
    report(table_path)
    assert "| toy | LoRA | 51.50 ± 0.71 (2) | 102 ± 1 (2) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("failed", "told"),
    [
        (FailedStage("train", "a"), dict.fromkeys(["toy", "mbpp", "inheritance", None], "train: a")),
        (FailedStage("generate", "b"), dict.fromkeys(["toy", "mbpp", "inheritance"], "generate: b")),
        (FailedStage("score toy", "c", {"toy": "c", "mbpp": "d"}), {"toy": "toy: c", "mbpp": "mbpp: d"}),
        (FailedStage("inheritance", "e", {"inheritance": "e"}), {"inheritance": "inheritance: e"}),
    ],
)
def test_which_columns_a_failed_stage_concerns(failed, told):
    columns = [ReportColumn("x", "x", task=task, metric="x") for task in ("toy", "mbpp", "inheritance", None)]
    assert {column.task: line for column in columns if (line := failed.told(column))} == told


def test_tests_are_not_lost_where_the_grades_are_elsewhere(table_path, report, tmp_path):
    """The earlier report was made on another machine, which has the runs' grades."""
    fill(table_path)
    assert report(table_path) == 0  # there was nothing to lose
    path = tmp_path / "report" / "table.json"
    facts = json.loads(path.read_text())
    facts["comparisons"][0]["num_items"] = 400
    write_json_atomic(path, facts)
    before = path.read_bytes()
    with pytest.raises(UserError, match="has 1 tests whose grades are not at hand here: bring the runs' outputs along"):
        report(table_path)
    assert path.read_bytes() == before
    write_json_atomic(path, facts | {"statistics": "a bootstrap over items"})
    assert report(table_path) == 0  # tests of another kind are no loss


def test_hypotheses_are_not_lost_either(tmp_path):
    def facts(**finding):
        hypotheses = [{"hypothesis": {"name": "H1"}, **finding}]
        return {"statistics": "t", "comparisons": [], "hypotheses": hypotheses}

    path = tmp_path / "table.json"
    write_json_atomic(path, facts(low=-1.0, num_items=300))
    with pytest.raises(UserError, match="has 1 tests whose grades are not at hand"):
        _refuse_lost_tests(facts(low=-1.1, num_items=None), path)
    _refuse_lost_tests(facts(low=None, num_items=None), path)  # not run: told by itself
    _refuse_lost_tests(facts(low=-1.0, num_items=300), path)


def test_the_report_tells_what_was_declared_before_the_first_run(table_path, report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "RESULTS_PATH", tmp_path / "results")
    table = yaml.safe_load(table_path.read_text())
    table["report"]["primary"] = [{"column": "strict", "focus": "ba_lora", "against": "lora"}]
    table_path.write_text(yaml.safe_dump(table, sort_keys=False))
    folder = report_folder("two")
    record_path = grid_state.declaration_path(folder, None)
    grid_state.declare(load_table(table_path), table_path, record_path)
    fill(table_path)
    report(table_path)
    assert "sha256" in (told := capsys.readouterr().out) and "its primary tests are as declared" in told
    shown = {"title": "Another", "note": "More words.", "labels": {"strict": "Toy"}}
    figures = table["report"] | {"figures": {"dots": {"kind": "dots", "columns": ["strict"]}}}
    table_path.write_text(yaml.safe_dump(table | shown | {"report": figures}, sort_keys=False))
    report(table_path)
    assert "the file was changed since; its primary tests are as declared" in capsys.readouterr().out
    choices = {"paired": True, "collapsed": {"column": "strict", "below": 10}, "compare_within": ["base", "setting"]}
    for key, value in choices.items():
        table_path.write_text(yaml.safe_dump(table | {"report": table["report"] | {key: value}}, sort_keys=False))
        report(table_path)
        assert "what decides its tests was changed (report): all tests" in capsys.readouterr().out
    table_path.write_text(yaml.safe_dump(table | {"seeds": table["seeds"][:1]}, sort_keys=False))
    report(table_path)
    assert "what decides its tests was changed (runs, seeds): all tests" in capsys.readouterr().out
    table["report"]["primary"][0]["column"] = "seconds"
    table["columns"]["seconds"]["task"] = "toy"
    table_path.write_text(yaml.safe_dump(table, sort_keys=False))
    grid_state.declare(load_table(table_path), table_path, record_path)  # the record of the first run stays
    report(table_path)
    told = capsys.readouterr().out
    assert "the file was changed since; what decides its tests was changed (columns, report): all tests" in told
    table["report"]["primary"] = [{"column": "strict", "focus": "lora", "against": "ba_lora"}]
    table_path.write_text(yaml.safe_dump(table, sort_keys=False))
    with pytest.raises(
        UserError, match="report.primary: the table has no comparison of lora against ba_lora in strict"
    ):
        report(table_path)
    record_path.write_text("{}")
    table_path.write_text(yaml.safe_dump(table | {"report": {}}, sort_keys=False))
    with pytest.raises(UserError, match="declared.json is damaged"):
        report(table_path)


def test_a_declaration_lies_in_the_chosen_folder_and_counts_there(table_path, report, tmp_path, monkeypatch, capsys):
    """Nothing is left in results/<table>, and the family is compared as one that was declared before a result."""
    monkeypatch.setattr(tables, "RESULTS_PATH", tmp_path / "results")
    table = yaml.safe_load(table_path.read_text())
    table["report"]["primary"] = [{"column": "strict", "focus": "ba_lora", "against": "lora"}]
    table_path.write_text(yaml.safe_dump(table, sort_keys=False))
    folder, output = report_folder("two"), tmp_path / "report"
    chosen = grid_state.declaration_path(folder, output)
    assert chosen == output / "declared.json"
    grid_state.declare(load_table(table_path), table_path, chosen)
    fill(table_path)
    report(table_path)
    assert "its primary tests are as declared" in capsys.readouterr().out and not folder.exists()
    comparisons = json.loads((output / "table.json").read_text())["comparisons"]
    assert [one["column"] for one in comparisons if one["family"] == "primary"] == ["strict"]
    later = grid_state.declaration_path(folder, None)  # a report of results/<table> has its own: now with results
    grid_state.declare(load_table(table_path), table_path, later)
    assert grid_state.read_declaration(later)["num_results"] == 4
    assert grid_state.declaration_path(folder, output) == chosen
    assert grid_state.declaration_path(folder, tmp_path / "other") == later  # as long as that folder has none


def test_a_primary_family_has_at_most_five_tests(table_path, report):
    table = yaml.safe_load(table_path.read_text())
    table["rows"][0]["settings"] = {f"rank={rank}": [f"adapter.rank={rank}"] for rank in range(1, 7)}
    entry = {"column": "strict", "focus": "ba_lora", "against": "lora"}
    table["report"] |= {"primary": [entry], "compare_within": ["base", "setting"]}
    table_path.write_text(yaml.safe_dump(table, sort_keys=False))
    with pytest.raises(UserError, match="report.primary: 6 tests, at most 5 are allowed: name a base or a setting"):
        report(table_path)
    table["report"]["primary"] = [entry | {"setting": "rank=2"}]
    table_path.write_text(yaml.safe_dump(table, sort_keys=False))
    assert table_spec(load_table(table_path)).num_primary == 1


def test_a_result_of_another_number_of_processes_is_refused(table_path, report):
    """Its effective batch is another than its row's."""
    fill(table_path)
    [first, *_] = load_table(table_path).cells
    made = json.loads(first.config.result_path.read_text())
    made["training"]["num_processes"] = 4
    write_json_atomic(first.config.result_path, made)
    with pytest.raises(UserError, match="trained by 4 process.es., its row is set for 1: set the row's gpus"):
        report(table_path)


def test_a_seed_counts_once(table_path, report):
    fill(table_path)
    with pytest.raises(UserError, match="seed 1 is asked for more than once"):
        report(table_path, "seeds=[1,1]")


def test_refused_settings_leave_nothing_half_written(table_path, report, tmp_path):
    fill(table_path)
    [first, *_] = load_table(table_path).cells
    made = json.loads(first.config.result_path.read_text())
    made["evaluation"]["toy"]["generation"] = {"engine": "vllm"}
    write_json_atomic(first.config.result_path, made)
    with pytest.raises(UserError, match="engine differs in column strict"):
        report(table_path)
    assert not (tmp_path / "report").exists()
    assert report(table_path, "allow=engine") == 0
    assert "engine: vllm" in (tmp_path / "report" / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tyo"], "no such table: tyo .nearest: toy"),
        (["toy", "allow=engin"], "allow=engin is no setting.*nearest: engine"),
        (["toy", "fast"], "cannot read 'fast': give key=value"),
        (["toy", "seeds=[1,b]"], "seeds=.1,b.: whole numbers are needed"),
    ],
)
def test_words_that_are_wrong(report, words, message):
    with pytest.raises(UserError, match=message):
        report(*words)


def test_a_wrong_report_block_is_told_before_anything_is_read(table_path, report):
    table = yaml.safe_load(table_path.read_text())
    table["report"]["figures"]["accuracy"]["kind"] = "dot"
    table_path.write_text(yaml.safe_dump(table, sort_keys=False))
    with pytest.raises(UserError, match="table two: figure accuracy: kind=dot is unknown.*nearest: dots"):
        report(table_path)


def test_a_report_leaves_a_folder_of_ones_own_where_its_page_would_stand(table_path, report, tmp_path):
    """And writes no table before it says so."""
    fill(table_path)
    own = tmp_path / "report" / "page" / "notes.md"
    own.parent.mkdir(parents=True)
    own.write_text("somebody's")
    with pytest.raises(UserError, match="holds notes.md, which a page written there would delete"):
        report(table_path, "page=yes")
    assert [path for path in (tmp_path / "report").rglob("*") if path.is_file()] == [own]
