"""What a grid says before it does anything, and what it refuses to train for."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from ba_lora.errors import UserError
from ba_lora.experiments import grid
from ba_lora.experiments import plan as grid_plan
from ba_lora.experiments.executors.base import Slot
from ba_lora.experiments.executors.local import LocalExecutor
from ba_lora.experiments.options import select_rows
from ba_lora.experiments.plan import Checks, ask_evaluators, dry_run, plan_runs
from ba_lora.experiments.tables import available_tables, find_table, load_table
from ba_lora.io import write_jsonl_atomic
from eval import metric_paths
from eval.tasks import TASKS
from eval.tasks.base import Item
from eval.tasks.code import CodeTask
from tests.workers import fake_grid


def test_another_config_is_named(grid_folder):
    fake_grid.run(fake_grid.table(grid_folder))
    changed = fake_grid.table(grid_folder, overrides=["data.num_rows=7"])
    text = "\n".join(dry_run(changed, plan_runs(changed, Checks(fake_grid.GRADERS))))
    assert text.count("stale ") == 6 and "config changed since toy-lora-s1-" in text
    assert (
        sum(entry.changed is not None for entry in plan_runs(changed, Checks(fake_grid.GRADERS))) == 6
    )  # told once a run
    assert "6 stale" in text and "18 cells" not in text and "12 cells from 6 runs" in text


def test_a_missing_judge_is_told_before_the_first_training(grid_folder, monkeypatch):
    for name in ("JUDGE_MODEL", "JUDGE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    column = {"task": "mt_bench", "metric": "rating", "unit": "points"}
    judged = fake_grid.table(grid_folder, columns={"mt_bench": column})
    told = [
        line
        for line in dry_run(judged, plan_runs(judged, Checks()))
        if line.startswith("warning: JUDGE_MODEL is not set")
    ]
    assert len(told) == 1
    table = fake_grid.table(grid_folder)
    assert not any("JUDGE" in line for line in dry_run(table, plan_runs(table, Checks())))


def test_each_run_is_looked_at_once(grid_folder, monkeypatch):
    """Not once a cell, of which it may fill many: a look reads and hashes files."""
    looked, real = [], grid_plan.inspect
    monkeypatch.setattr(grid_plan, "inspect", lambda spec, graders: looked.append(spec) or real(spec, graders))
    table = fake_grid.table(grid_folder)
    plan_runs(table, Checks(fake_grid.GRADERS))
    assert looked == table.specs() and len(table.cells) == 2 * len(looked)


def test_a_table_without_runs_is_refused(grid_folder):
    rows = [{"bases": ["toy"], "methods": []}]
    with pytest.raises(UserError, match="fake: the table has no run: every entry of rows needs bases and methods"):
        select_rows(fake_grid.table(grid_folder, rows=rows), [])


def test_a_run_that_cannot_be_looked_at_is_told_beside_the_others(grid_folder):
    table = fake_grid.table(grid_folder, seeds=[1])
    fake_grid.run(table)
    bad = table.specs()[0].config.run_path
    (bad / "claim.json").write_text("{")
    lines = dry_run(table, plan_runs(table, Checks(fake_grid.GRADERS)))
    assert lines[0].startswith("failed ") and "claim.json, line 1: not valid JSON" in lines[1]
    assert lines[2].startswith("done ") and lines[3].endswith("1 failed, 1 done")


def test_what_failed_costs_nothing_unless_it_is_tried_again(grid_folder, monkeypatch):
    table = fake_grid.table(grid_folder, seeds=[1])
    bad = table.specs()[0].config.run_path
    (grid_folder / "fail").write_text(f"train {bad.name}\n")
    fake_grid.run(table)
    costs = []
    monkeypatch.setattr(grid_plan, "estimate_lines", lambda left: costs.append(left) or [])
    for retry in (False, True):
        dry_run(table, plan_runs(table, Checks(fake_grid.GRADERS)), retry=retry)
    assert costs[0] == []
    ((spec, state),) = costs[1]
    assert spec.config.run_path == bad and state.train


@pytest.fixture
def settings(tmp_path, root, monkeypatch):
    """A table of the toy with a good setting and others: `settings(name=words)` → its plan, by setting."""
    monkeypatch.chdir(root)

    def planned(*words, kind="nlg", base="toy", task="toy", **of_names):
        named = {"good": []} | of_names
        rows = {name: [f"data.num_rows={10 + place}", *own] for place, (name, own) in enumerate(named.items())}
        raw = {
            "title": "Settings",
            "kind": kind,
            "seeds": [1, 2],
            "overrides": [f"results_dir={tmp_path}", *words],
            "rows": [{"bases": [base], "methods": ["lora"], "settings": rows}],
            "columns": {"score": {"task": task, "metric": "strict" if kind == "nlg" else "accuracy"}},
        }
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(raw))
        table = load_table(path)
        entries = plan_runs(table, ask_evaluators(table))
        assert len(entries) == 2 * len(named)
        return {entry.cells[0].row.setting: entry for entry in entries}

    return planned


def test_an_evaluation_that_cannot_work_is_refused_before_the_training(settings, tmp_path, monkeypatch):
    """All are asked in one process, each setting once for its seeds."""
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: calls.append(more["input"]) or run(*words, **more))
    write_jsonl_atomic(tmp_path / "other.jsonl", [{"text": "no question"}])
    planned = settings(
        value=["eval.options.temperature=warm"],
        template=["eval.options.template=no_such"],
        file=["eval.data.toy=/nope.jsonl"],
        columns=[f"eval.data.toy={tmp_path}/other.jsonl"],
    )
    refused = {name: entry.refused for name, entry in planned.items()}
    assert refused.pop("good") is None
    for name, message in {
        "value": "temperature=warm: a number is needed",
        "template": "no_such",
        "file": "eval.data.toy: no such file: /nope.jsonl",
        "columns": "other.jsonl",
    }.items():
        assert message in refused[name] and "\n" not in refused[name]
    assert len(calls) == 1 and calls[0].count("eval.generate") == 4


def test_a_mistyped_setting_of_the_evaluation_is_told_when_the_table_is_read(settings):
    with pytest.raises(UserError, match="unknown key eval.options.temprature .nearest: temperature"):
        settings(option=["eval.options.temprature=1"])


def test_a_classifiers_evaluation_is_checked_too(settings, tmp_path):
    write_jsonl_atomic(tmp_path / "imdb.jsonl", [{"text": "good film", "label": 1}])
    write_jsonl_atomic(tmp_path / "other.jsonl", [{"words": "good film"}])
    files = {"fits": "imdb.jsonl", "columns": "other.jsonl"}
    of_names = {name: [f"eval.data.imdb={tmp_path}/{file}"] for name, file in files.items()}
    planned = settings("task=sst2", kind="nlu", base="minilm", task="imdb", **of_names)
    assert planned["good"].refused is None and planned["fits"].refused is None
    assert "other.jsonl" in planned["columns"].refused


def test_a_refused_run_is_not_trained_and_the_others_are(grid_folder, monkeypatch, capsys):
    """The command as it is typed, its stages faked."""
    table = fake_grid.table(grid_folder, seeds=[1])
    bad, good = table.specs()
    error = "eval.data.toy: no such file"
    checks = Checks(fake_grid.GRADERS, {bad.config.run_path: error})
    monkeypatch.setattr(grid, "ask_evaluators", lambda table, prepared: checks)
    monkeypatch.setattr(grid, "open_executor", lambda *_, **__: LocalExecutor([Slot("worker", {})]))
    monkeypatch.setattr(grid, "subprocess", SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=0)))
    command = ["grid", str(grid_folder / "fake.yaml"), "seeds=1"]
    monkeypatch.setattr(sys, "argv", [*command, f"output={grid_folder}/chosen"])
    name = bad.config.run_path.name
    assert grid.main() == 1
    printed = capsys.readouterr().out
    assert f"failed: 1 runs cannot be evaluated and are not trained: {error}\n" in printed
    assert f"failed: {name}: {error}\n" in printed and "1 of 2 done, 1 failed" in printed
    assert not any(name in line for line in fake_grid.ledger(grid_folder))
    assert good.config.result_path.is_file()
    declared = json.loads((grid_folder / "chosen" / "declared.json").read_text())  # of before the first run
    assert (declared["num_results"], declared["tests"]["seeds"], declared["sha256"]) == (0, [1], table.sha256)
    assert declared["dirty"] is True  # no commit has this table
    assert not (grid_folder / "reports").exists()
    monkeypatch.setattr(sys, "argv", command)
    assert grid.main() == 1
    [record] = (grid_folder / "reports").glob("fake-*/declared.json")
    assert json.loads(record.read_text())["num_results"] == 1
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*command, "--dry-run"])
    assert grid.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("failed ") and lines[1].strip() == error and lines[3].endswith("1 failed, 1 done")


@pytest.mark.parametrize(
    ("task", "metric", "nearest"),
    [
        ("toy", "strct", "toy has strict, flexible, .*nearest: strict"),
        ("toy", "groups.familly.age.metrics.strict", "toy has"),
        ("toy", "groups.family.age.metrics.f1", "toy has"),
        ("humaneval", "pass@2", "humaneval has strict, pass@1, pass@5"),
        ("mt_bench", "strict", "mt_bench has rating"),
        ("inheritance", "perplexity", "inheritance has .*perplexity.before, perplexity.after"),
        ("cola", "accuracy", "cola has matthews"),
        ("stsb", "nll", "stsb has pearson"),
        ("mnli", "per_class.recall.contradicton", "nearest: per_class.recall.contradiction"),
        ("gsm8", "strict", "task gsm8 is unknown .*nearest: gsm8k"),
    ],
)
def test_a_mistyped_metric_is_told_before_any_training(task, metric, nearest):
    with pytest.raises(UserError, match=nearest):
        metric_paths.check(["nlg", task, metric])


def test_every_metric_of_the_tables_is_known_and_a_score_has_those_that_are_named():
    tables = [yaml.safe_load(find_table(name).read_text()) for name in available_tables()]
    named = {
        (table["kind"], c["task"], c["metric"]) for table in tables for c in table["columns"].values() if "task" in c
    }
    assert len(named) > 30
    for words in named:
        metric_paths.check(words)
    with pytest.raises(UserError, match="likelihood has p_right"):
        metric_paths.check(["nlu", "likelihood", "perplexity.after"])
    with pytest.raises(UserError, match="likelihood has p_right"):
        metric_paths.check(["nlg", "likelihood", "groups.kind.synonym.metrics.p_wrong"])
    for task in TASKS.values():
        if not task.judged and not isinstance(task, CodeTask):
            grade = task.grade(Item("x/0", "?", "The answer is: 1", {"wrong_answer": "21"}), "The answer is: 1")
            assert set(grade.metrics) == set(task.metrics), task.name


def test_the_command_refuses_a_mistyped_metric_as_it_is_typed(grid_folder, monkeypatch):
    fake_grid.table(grid_folder, columns={"strict": {"task": "toy", "metric": "strct"}})
    monkeypatch.setattr(sys, "argv", ["grid", str(grid_folder / "fake.yaml"), "--dry-run"])
    with pytest.raises(UserError, match="table fake: columns.strict: metric strct: toy has strict, flexible"):
        grid.main()
    assert not list((grid_folder / "reports").glob("*"))


def test_a_dry_run_tells_what_a_limit_does_to_the_table(grid_folder):
    table = fake_grid.table(grid_folder, overrides=["eval.limit=7"])
    lines = dry_run(table, plan_runs(table, Checks(fake_grid.GRADERS)))
    assert "eval.limit=7: scores are of the first items only, as a footnote of the table will say" in lines
    settings = {"all": [], "some": ["eval.limit=7"]}
    rows = [{"bases": ["toy"], "methods": ["lora"], "settings": {"all": []}}]
    rows += [{"bases": ["toy"], "methods": ["lora"], "settings": {"some": settings["some"]}, "suffix": "some"}]
    lines = grid_plan.limit_lines(fake_grid.table(grid_folder, rows=rows))
    assert lines and all("eval.limit differs among its rows (none, 7): the report refuses that" in x for x in lines)
    assert not grid_plan.limit_lines(fake_grid.table(grid_folder))
