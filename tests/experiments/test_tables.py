"""Table files: every one loads and resolves; a broken one is told in one line."""

import cProfile
import csv
import dataclasses
import json
import pstats
import re
import resource
import shutil
import subprocess
import sys

import pytest
import yaml

from ba_lora.config.layers import read_yaml
from ba_lora.errors import UserError
from ba_lora.experiments import grid, stages, table_file, tables
from ba_lora.experiments.options import without_unchosen
from ba_lora.experiments.search.space import load_space
from ba_lora.experiments.spec import Spec
from ba_lora.experiments.stages import evaluation_stages, training_stage
from ba_lora.experiments.tables import Row, load_table
from ba_lora.glue import find_task
from ba_lora.paths import PROJECT_ROOT
from eval import generate, score
from eval.report.spec import table_spec
from eval.tasks import TASKS, get_task
from tests.support.tiers import mostly_slow

FILES = sorted((PROJECT_ROOT / "configs" / "tables").glob("*.yaml"))

SMALL = {
    "title": "A table",
    "kind": "nlg",
    "seeds": [1, 2],
    "overrides": ["data.num_rows=32"],
    "rows": [
        {"bases": ["toy"], "methods": ["lora", "ba_lora"], "settings": {"": [], "rank=4": ["adapter.rank=4"]}},
        {"bases": ["toy"], "methods": ["full_ft"], "overrides": ["trainer.learning_rate=1.0e-4"]},
        {"bases": ["toy"], "methods": ["untuned"]},
        {"bases": ["toy"], "methods": ["lora"], "overrides": ["eval.engine=vllm"], "suffix": "vllm"},
    ],
    "columns": {
        "strict": {"task": "toy", "metric": "strict"},
        "flexible": {"task": "toy", "metric": "flexible"},
        "noise": {"task": "toy", "metric": "strict", "overrides": ["data.toy.label_noise=0.5"]},
        "seconds": {"metric": "training.seconds", "unit": "s", "better": "lower"},
        "mean": {"mean_of": ["strict", "noise"]},
    },
}


def write(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (SMALL | changes).items() if value is not None}))
    return path


def test_there_are_tables():
    assert FILES and [path.stem for path in FILES] == tables.available_tables()


QUICK = ("toy", "nlg_main", "factorial", "imbalance", "noise_glue")  # the others are left to the slow tier


@pytest.mark.parametrize("name", ["methods", "inheritance"])
def test_the_largest_tables_are_read_in_little_time(name):
    """Counted in calls, which a busy machine does not change; the next test takes the whole command's time."""
    profile = cProfile.Profile()
    profile.runcall(load_table, PROJECT_ROOT / "configs" / "tables" / f"{name}.yaml")
    assert pstats.Stats(profile).total_calls < 4_500_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["methods", "nlu_main"])
def test_a_dry_run_takes_little_of_the_cpu(name, root, record_property):
    """The whole command: 2.9 to 3.9 s on free cores (to be at most 4), 4.2 to 5.0 s on busy ones, which are slower."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "ba_lora.experiments.grid", name, "--dry-run"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name}: {seconds:.1f} s of CPU")
    record_property("cpu_seconds", seconds)
    assert done.returncode == 0 and " runs" in done.stdout and seconds < 8


def scored(config):
    own = find_task(config.nlu.task).dev_sets if config.kind == "nlu" else ()
    return [*own, *config.eval.tasks]


@pytest.mark.parametrize("path", mostly_slow(FILES, QUICK, name=lambda path: path.stem))
def test_every_table_resolves(path):
    """Every cell has a run that evaluates what the cell shows; the report can read it; its size is told as it is."""
    table = load_table(path, seeds=[3, 4])
    assert table_spec(table).figures or "figures" not in table.report
    assert table.rows and table.columns and table.cells
    for cell in table.cells:
        assert cell.config.seed in table.seeds and cell.config.method == cell.row.method
        if cell.column.task is not None:
            assert cell.column.task in scored(cell.config)
    with_cells = {cell.row for cell in table.cells}
    assert with_cells == set(table.rows)
    assert len(table.specs()) == len({spec.config.result_path for spec in table.specs()})
    trainings_of_a_seed = sum(spec.trained for spec in table.specs()) / len(table.seeds)
    (told,) = re.findall(
        rf"\| `{path.stem}` \| (\d+)", (PROJECT_ROOT / "docs" / "tables.md").read_text(encoding="utf-8")
    )
    assert int(told) == trainings_of_a_seed * len(read_yaml(path)["seeds"])


def test_usual_names_stand_in_one_file():
    """Of a table whose report is not kept: one with a kept report stays as it was when that was made."""
    usual = read_yaml(tables.LABELS_PATH)
    files = [path for kind in ("methods", "nlg", "nlu") for path in (PROJECT_ROOT / "configs" / kind).glob("*.yaml")]
    assert {path.stem for path in files} - {"toy", "minilm"} <= set(usual)
    for path in FILES:
        if not (PROJECT_ROOT / "results" / path.stem).is_dir():
            assert not (read_yaml(path).get("labels") or {}).items() & usual.items(), path


def test_rows_columns_and_shared_runs(tmp_path):
    table = load_table(write(tmp_path))
    assert table.rows[:2] == (Row("toy", "lora"), Row("toy", "lora", "rank=4"))
    assert table.rows[-1] == Row("toy", "lora", "vllm") and table.ours == ("ba_lora",)
    named = table_spec(load_table(write(tmp_path, labels={"lora": "plain LoRA"})))
    assert [named.label(name) for name in ("lora", "ba_lora", "strict")] == ["plain LoRA", "BA-LoRA (2024)", "strict"]
    runs = {}
    for cell in table.cells:
        runs.setdefault((cell.row, cell.seed), {})[cell.column.name] = cell.config
    one = runs[Row("toy", "lora"), 1]
    assert one["strict"] is one["flexible"] is one["seconds"]  # one run, evaluated once
    assert one["noise"].run_id != one["strict"].run_id and one["noise"].data.toy.label_noise == 0.5
    assert "mean" not in one
    assert one["strict"].eval.tasks == ["toy"] and one["strict"].data.num_rows == 32
    assert runs[Row("toy", "lora", "rank=4"), 2]["strict"].adapter.rank == 4
    again = runs[Row("toy", "lora", "vllm"), 1]["strict"]
    assert again.run_id == one["strict"].run_id and again.run_path.name == f"{again.run_id}-vllm"
    assert again.result_path != one["strict"].result_path
    # served as adapters on one base, whoever is evaluated with whom; full fine-tuning is a model of its own
    assert one["strict"].eval.options == {"serve": "hot"} and not one["strict"].export.merged
    pissa, lora = runs[Row("toy", "ba_lora"), 1]["strict"], one["strict"]
    assert (pissa.adapter.factors_cache, lora.adapter.factors_cache) == (tables.FACTORS_CACHE, None)
    full = runs[Row("toy", "full_ft"), 1]["strict"]
    assert full.eval.options == {"serve": "merged"} and full.export.merged
    assert [cell.seed for cell in table.cells if cell.row.method == "untuned"] == [1] * 4
    for spec in table.specs():  # what is typed gives what is held
        if spec.trained:
            assert Spec.resolve(spec.config_path, spec.method, spec.overrides).config == spec.config
    # 4 adapter rows, full, again: each 2 seeds × 2 trainings; untuned: one model, whatever it might be trained on
    assert len(table.specs()) == 6 * 2 * 2 + 1


def test_an_nlu_table(tmp_path):
    """A training for each task; its own dev sets come with it, the sets out of its domain are evaluated after it."""
    columns = {
        "mnli": {"task": "mnli", "metric": "accuracy", "overrides": ["task=mnli"]},
        "snli": {"task": "snli", "metric": "accuracy", "overrides": ["task=mnli"]},
        "rte": {"task": "rte", "metric": "accuracy", "overrides": ["task=rte"]},
        "rte_to_mrpc": {"task": "mrpc", "metric": "accuracy", "overrides": ["task=rte"]},
    }
    rows = [{"bases": ["minilm"], "methods": ["lora", "bitfit"]}]
    table = load_table(write(tmp_path, kind="nlu", rows=rows, columns=columns, overrides=None))
    assert len(table.specs()) == 2 * 2 * 2 and len(table.cells) == 2 * 2 * 4
    tasks = {cell.column.name: cell.config.eval.tasks for cell in table.cells}
    assert tasks == {"mnli": ["snli"], "snli": ["snli"], "rte": ["mrpc"], "rte_to_mrpc": ["mrpc"]}
    first = table.specs()[0]
    assert training_stage(first, ["python"]).call.module == "train_nlu.py" and first.config.run_id.startswith(
        "minilm-mnli"
    )
    with pytest.raises(UserError, match="there is no untuned model"):
        rows = [{"bases": ["minilm"], "methods": ["untuned"]}]
        load_table(write(tmp_path, kind="nlu", rows=rows, columns=columns, overrides=None))


def test_the_command_line_changes_every_run(tmp_path):
    table = load_table(write(tmp_path), overrides=["data.num_rows=8", "trainer.max_steps=2"], seeds=[7])
    trained = [spec.config for spec in table.specs() if spec.trained]
    assert all(config.data.num_rows == 8 and config.trainer["max_steps"] == 2 for config in trained)
    assert {config.seed for config in trained} == {7}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("adapter.rank=8", "adapter.rank is what this table varies; use only=…"),  # a setting's
        ("trainer.learning_rate=1.0e-3", "trainer.learning_rate is what this table varies"),  # some rows'
        ("data.toy.label_noise=0.2", "data.toy.label_noise is what this table varies"),  # a column's
        ("adapter={rank: 8}", "adapter is what this table varies"),
        ("method=lora", "method is what this table varies"),
        ("seed=1", "seed= has no meaning for a whole table .nearest: seeds"),
        ("output_dir=there", "output_dir= has no meaning for a whole table"),
    ],
)
def test_what_tells_rows_or_columns_apart_cannot_be_typed(tmp_path, word, message):
    """It would win over the table's own words, and every row would be the same run under another label."""
    with pytest.raises(UserError, match=message) as caught:
        load_table(write(tmp_path), overrides=[word])
    assert "\n" not in str(caught.value)


def test_what_all_rows_set_alike_can_be_typed(tmp_path):
    """It tells none of them apart: in one block or in several."""
    block = {"bases": ["toy"], "methods": ["lora"], "overrides": ["trainer.max_steps=9", "adapter.alpha=8"]}
    other = block | {"methods": ["pissa"], "overrides": ["trainer.max_steps=9", "adapter.alpha=4"]}
    path = write(tmp_path, rows=[block, other])
    table = load_table(path, overrides=["trainer.max_steps=2"])
    assert {spec.config.trainer["max_steps"] for spec in table.specs()} == {2}
    for key in ("adapter.alpha", "trainer.learning_rate"):
        lone = [block | {"overrides": [*block["overrides"], "trainer.learning_rate=1e-3"]}, other]
        with pytest.raises(UserError, match=f"{key} is what this table varies"):
            load_table(write(tmp_path, rows=lone), overrides=[f"{key}=1"])


def test_the_task_of_an_nlu_table_cannot_be_typed():
    with pytest.raises(UserError, match="task is what this table varies"):
        load_table(tables.find_table("diversity_form"), overrides=["task=rte"])
    load_table(tables.find_table("compute"), overrides=["trainer.gradient_accumulation_steps=4"])  # of all rows


def test_a_reference_cache_has_a_folder_for_each_base_and_data_set(tmp_path):
    """Methods, initialisations and seeds share it; what is trained without the term, or in NLU, needs none."""
    rows = [{"bases": ["toy"], "methods": ["ba_lora", "lora_ba", "lora", "ba_lora_iclr2026"]}]
    table = load_table(write(tmp_path, rows=rows), overrides=["reference.cache=outputs/reference"])
    plain = load_table(write(tmp_path, rows=rows))
    folders = {}
    for cell in table.cells:
        folders.setdefault((cell.row.method, cell.column.name), set()).add(cell.config.reference.cache)
    assert folders["ba_lora", "strict"] == folders["lora_ba", "strict"]
    (one,), (noisy,), (tempered,) = (
        folders[key] for key in (("ba_lora", "strict"), ("ba_lora", "noise"), ("ba_lora_iclr2026", "strict"))
    )
    assert one.startswith("outputs/reference/toy-toy-") and len({one, noisy, tempered}) == 3
    for spec, without in zip(table.specs(), plain.specs(), strict=True):
        assert Spec.resolve(spec.config_path, spec.method, spec.overrides).config == spec.config
        assert (spec.config.run_id == without.config.run_id) == (spec.method == "lora")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": None}, "title is missing"),
        ({"kind": "vision"}, "kind=vision is unknown: choose one of nlg, nlu"),
        ({"seed": [1]}, r"unknown key seed \(nearest: seeds"),
        ({"seeds": ["one"]}, r"seeds: \['one'\]: a list, each a whole number, is needed"),
        ({"seeds": 3}, "seeds: 3: a list, each a whole number, is needed"),
        ({"seeds": [2, 1, 2]}, "seed 2 is asked for more than once"),
        ({"rows": [{"bases": ["toy"], "methods": ["lorra"]}]}, r"entry 1: method=lorra is unknown.*nearest: lora"),
        ({"rows": [{"bases": ["toi"], "methods": ["lora"]}]}, "entry 1: no such config"),
        ({"rows": [{"base": ["toy"]}]}, r"entry 1: unknown key base \(nearest: bases"),
        ({"rows": SMALL["rows"][:1] * 2}, "entry 2: toy, lora, '' stands in the table twice"),
        ({"overrides": ["data.rows=3"]}, "unknown key data.rows"),
        ({"columns": {"x": {"task": "toy"}}}, "columns.x: either metric or mean_of is needed"),
        ({"columns": {"x": {"task": "toi", "metric": "strict"}}}, "eval.tasks=toi is unknown"),
        ({"columns": {"x": {"metric": "a", "better": "more"}}}, "better=more is unknown"),
        ({"columns": SMALL["columns"] | {"m": {"mean_of": ["stict"]}}}, r"no column stict \(nearest: strict"),
        ({"ours": ["pissa"]}, "ours: no row has the method pissa"),
        ({"paper": ["no_such"]}, "paper: no such file"),
    ],
)
def test_a_broken_table_is_told_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load_table(write(tmp_path, **changes))
    assert "\n" not in str(caught.value) and "small.yaml" in str(caught.value)


def test_a_file_that_is_no_yaml(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("rows: [")
    with pytest.raises(UserError, match="broken.yaml is not a valid YAML config"):
        load_table(path)
    with pytest.raises(UserError, match="no such table: nlg_mian"):
        tables.find_table("nlg_mian")


def test_paper_files_name_the_columns_they_have():
    """The table loader reads nothing from them, but a file without these columns is none of ours."""
    for path in sorted(table_file.PAPER_PATH.glob("*.csv")):
        with open(path, newline="") as file:
            header = next(csv.reader(file))
        assert header == ["table", "model", "method", "setting", "task", "metric", "mean", "std", "source"], path


@pytest.mark.parametrize("path", mostly_slow(FILES, QUICK, name=lambda path: path.stem))
def test_every_evaluation_is_one_that_the_evaluators_take(path, monkeypatch):
    """A word that eval.generate or eval.score refuses would show only after the trainings."""
    asked = []
    monkeypatch.setattr(generate, "run", lambda models, tasks, **settings: asked.append(set(tasks)))
    table = load_table(path, seeds=[1])
    if table.prepare or table.id.startswith("inheritance_nlu_sst2"):  # data.lab_nlu makes the data
        monkeypatch.setattr(stages, "data_file", lambda config, task: config.eval.data[task])
    for spec in table.specs():
        for stage in evaluation_stages([spec.config]):
            module, words = stage.call.module, stage.call.words
            if module == "eval.generate":
                generate.main(words)
                assert asked.pop() == set(spec.config.eval.tasks) & set(TASKS)
            elif module == "eval.score":
                tasks = [get_task(word) for word in words if word in TASKS]
                assert tasks and score.read_options([word for word in words if "=" in word], tasks)


@pytest.mark.slow
def test_tables_that_share_a_run_evaluate_it_alike():
    """But for the tasks; else each would call the other's evaluation stale."""
    evaluations = {}
    for path in FILES:
        for spec in load_table(path, seeds=[42]).specs():
            settings = dataclasses.replace(spec.config.eval, tasks=[])
            assert evaluations.setdefault(spec.config.run_path, settings) == settings, (path.stem, spec.config.run_id)


def test_one_run_is_not_evaluated_in_two_ways(tmp_path):
    settings = {"greedy": [], "warm": ["eval.options.temperature=0.5"]}
    rows = [{"bases": ["toy"], "methods": ["lora"], "settings": settings}]
    columns = {"strict": SMALL["columns"]["strict"]}
    with pytest.raises(UserError, match="'lora greedy strict' and 'lora warm strict' are one run with two evaluations"):
        load_table(write(tmp_path, rows=rows, columns=columns))
    rows = [
        rows[0] | {"settings": {"greedy": []}},
        {**rows[0], "settings": {"": settings["warm"]}, "suffix": "warm"},
    ]
    assert len(load_table(write(tmp_path, rows=rows, columns=columns)).specs()) == 4


def test_rows_take_the_best_values_of_their_own_searches(tmp_path, monkeypatch):
    monkeypatch.setattr("ba_lora.experiments.search.best.SEARCHES_PATH", tmp_path)
    for engine, method, value, rate in (
        ("tpe", "lora", 0.5, 1e-3),
        ("nomad", "lora", 0.4, 2e-3),
        ("tpe", "pissa", 0.9, 3e-3),
        ("nomad", "pissa", 0.95, 4e-3),
    ):
        folder = tmp_path / f"toy-{method}-toy" / f"{engine}-s0"
        folder.mkdir(parents=True)
        trials = [{"number": 0, "value": value, "words": [f"trainer.learning_rate={rate}"]}]
        space = load_space("toy", typed={"engine": engine, "search_seed": 0}).identity()
        (folder / "trials.json").write_text(json.dumps({"space": space, "best": 0, "trials": trials}))
    rows = [
        {
            "bases": ["toy"],
            "methods": ["lora", "pissa"],
            "search": "toy",
            "settings": {"": [], "rank=4": ["adapter.rank=4"]},
        }
    ]
    table = load_table(write(tmp_path, rows=rows))
    rates = {cell.row: cell.config.trainer["learning_rate"] for cell in table.cells}
    assert rates == {
        Row("toy", "lora"): 2e-3, Row("toy", "lora", "rank=4"): 2e-3,
        Row("toy", "pissa"): 3e-3, Row("toy", "pissa", "rank=4"): 3e-3,
    }  # fmt: skip
    with pytest.raises(UserError, match="trainer.learning_rate is what this table varies"):
        load_table(write(tmp_path, rows=rows), overrides=["trainer.learning_rate=1"])
    assert table.unchosen == {}
    rows[0] |= {"methods": ["lora", "ba_lora"], "gpus": 2}
    missing = load_table(write(tmp_path, rows=rows))
    assert set(missing.unchosen) == {Row("toy", "ba_lora"), Row("toy", "ba_lora", "rank=4")}
    assert set(missing.unchosen.values()) == {"sh scripts/search.sh toy toy method=ba_lora gpus=2"}
    (folder / "trials.json").write_text(json.dumps({"space": space | {"trials": 7}, "best": 0, "trials": trials}))
    with pytest.raises(UserError, match="trials.json is of another search space than toy .trials differ"):
        load_table(write(tmp_path, rows=[rows[0] | {"methods": ["pissa"]}]))
    (folder / "trials.json").unlink()  # LoRA would have the best of twice as many as PiSSA
    rows[0] |= {"methods": ["lora", "pissa"]}
    with pytest.raises(UserError, match="unequal budgets .toy lora: nomad-s0, tpe-s0; toy pissa: tpe-s0.: give each"):
        load_table(write(tmp_path, rows=rows))
    shutil.rmtree(folder.parent)  # not searched yet: its command is told
    assert set(load_table(write(tmp_path, rows=rows)).unchosen) == {Row("toy", "pissa"), Row("toy", "pissa", "rank=4")}


def test_a_table_takes_what_another_one_has_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS_PATH", tmp_path / "results")
    path = write(tmp_path, chosen="tuned", prepare=[["data.lab", "rule=0"]])
    before = load_table(path)
    assert before.prepare == (("data.lab", "rule=0"),)
    assert set(before.unchosen) == {row for row in before.rows if row.method != "untuned"}
    (tmp_path / "results" / "tuned").mkdir(parents=True)
    (tmp_path / "results" / "tuned" / "chosen.yaml").write_text(
        'lora: ["adapter.rank=2", "trainer.learning_rate=0.01"]'
    )
    after = load_table(path)
    assert {row.method for row in after.unchosen} == {"ba_lora", "full_ft"}
    left, lines = without_unchosen(after)
    assert {cell.row.method for cell in left.cells} == {"lora", "untuned"} and left.rows == after.rows
    assert lines == ["not chosen yet: the settings of ba_lora, full_ft: sh scripts/reproduce.sh tuned"]
    ranks = {(cell.row.method, cell.row.setting): cell.config.adapter.rank for cell in after.cells}
    assert ranks["lora", ""] == 2 and ranks["ba_lora", ""] == 8
    assert ranks["lora", "rank=4"] == 4  # the table's own words come after
    with pytest.raises(UserError, match="no such table: tunned"):
        load_table(write(tmp_path, chosen="tunned"))


def test_a_grid_runs_nothing_before_its_settings_are_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS_PATH", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["grid", str(write(tmp_path, chosen="tuned"))])
    with pytest.raises(UserError, match="not chosen yet: .*: sh scripts/reproduce.sh tuned"):
        grid.main()
    monkeypatch.setattr("sys.argv", ["grid", str(write(tmp_path, prepare=[["json.tool", f"{tmp_path}/none"]]))])
    with pytest.raises(UserError, match="python -m json.tool .* failed with exit status"):
        grid.main()
