"""What a page is made of: items from every kind of file, script files, runs of no table, and what is missing."""

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml

from ba_lora.config.layers import load_config
from ba_lora.config.schema import to_yaml
from ba_lora.errors import INCOMPLETE, UserError
from ba_lora.io import read_json, read_jsonl, write_json_atomic, write_jsonl_atomic, write_text_atomic
from eval import compare
from eval.page.build import HERE, POLICY, SCRIPTS, _noise, _render, own_script, write_page
from eval.page.items import read_answers
from eval.page.loose import find_runs, table_of_runs
from eval.page.runs import MOST_POINTS, ShownRun, _kind_and_task, describe_run
from eval.page.scripts import libraries, script
from eval.report.__main__ import main as report
from tests.support.page_world import HOSTILE, ITEMS, SEEDS, classified_run, solved, toy_run


def value_of(made):
    """The value of a script file, its literal taken apart as JavaScript takes it apart."""
    return json.loads(re.sub(r"\\(.)", r"\1", re.fullmatch(r"take\(\"[\w-]+\", '(.*)'\);\n", made)[1]))


def entry(world, run, task):
    return json.loads((world / run / "scores" / f"{task}.json").read_text()) | {"generation": {"template": "alpaca"}}


def test_an_answer_has_question_gold_extraction_and_verdict(world):
    answers = read_answers(world / "toy-lora-s1", "toy", entry(world, "toy-lora-s1", "toy"))
    assert (answers.kind, answers.metrics, answers.missing, len(answers.rows)) == (
        "text",
        ["strict", "flexible"],
        [],
        ITEMS,
    )
    row = answers.rows[1]
    assert row["question"].startswith("Ben is at the shop") and row["prompt"].endswith("### Response:")
    assert row["metrics"]["strict"] == float(solved("lora", 1, 1)) == 1.0 and row["extracted"]["strict"] == row["gold"]
    assert row["groups"] == {"family": "shopping"} and answers.rows[9]["finish"] == "length"


def test_hostile_answers_come_back_letter_by_letter(world):
    answers = read_answers(world / "toy-ba_lora-s1", "toy", entry(world, "toy-ba_lora-s1", "toy"))
    assert tuple(row["completion"] for row in answers.rows[: len(HOSTILE)]) == HOSTILE


def test_a_second_turn_has_its_own_question_and_judgements(world):
    answers = read_answers(world / "toy-full_ft-judged", "mt_bench", entry(world, "toy-full_ft-judged", "mt_bench"))
    first, second = answers.rows
    assert (first["question"], second["question"]) == ("Write a haiku.", "Now a limerick.")
    assert [one["judgement"] for one in second["judgements"]] == [f"Turn 2 was judged. [[{n}]]" for n in (8, 9)]
    assert answers.kind == "judged" and len(first["judgements"]) == 2


def test_a_classifiers_answer_is_its_prediction(world):
    answers = read_answers(world / "minilm-sst2", "sst2", entry(world, "minilm-sst2", "sst2"))
    assert [row["metrics"]["correct"] for row in answers.rows] == [0.0, 1.0, 0.0, 1.0]
    assert answers.rows[2]["probabilities"] == {"negative": 0.1192, "positive": 0.8808}
    assert (answers.rows[2]["question"], answers.rows[2]["gold"]) == ("film 2 is bad", "negative")


def test_the_answers_of_a_classifier_of_ones_own_and_its_base(tmp_path):
    data = tmp_path / "rows.tsv"
    data.write_text("tweet\tpolarity\n" + "".join(f"tweet {n}\t{'NP'[n % 2]}\n" for n in range(4)))
    task = {"name": "tass", "text": ["tweet"], "label": "polarity", "labels": ["N", "P"]}
    base = tmp_path / "own.yaml"
    base.write_text(
        yaml.safe_dump(
            {"model": {"name": "tiny"}, "nlu": {"task": task}, "data": {"source": str(data), "dev_share": 0.5}}
        )
    )
    run = tmp_path / "run"
    write_text_atomic(run / "config.yaml", to_yaml(load_config(base, method="lora", kind="nlu")))
    lines = [{"task_id": f"tass/{n}", "label": n % 2, "prediction": 1, "logits": [0.0, 1.0]} for n in (1, 2)]
    write_jsonl_atomic(run / "predictions" / "best.jsonl", lines)
    answers = read_answers(run, "tass", {"of_task": "tass", "definition": task, "metrics": {"accuracy": 0.5}})
    assert answers.missing == [] and [row["gold"] for row in answers.rows] == ["P", "N"]
    assert [row["question"] for row in answers.rows] == ["tweet 1", "tweet 2"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert _kind_and_task(config) == ("nlu", None) and _kind_and_task({"nlu": {"task": "sst2"}}) == ("nlu", "sst2")


def test_the_texts_of_generated_rows_are_the_runs_own(tmp_path):
    """Of the set that is asked for only; a damaged copy is told."""
    texts = tmp_path / "dev_texts.jsonl"
    rows = [{"task_id": f"toy_pairs/{n}", "texts": [f"premise {n}", f"hypothesis {n}"]} for n in (0, 1)]
    write_jsonl_atomic(texts, rows)
    line = {"label": 0, "prediction": 0, "logits": [1.0, 0.0, 0.0]}
    for name, file in (("toy_pairs", "best"), ("mnli", "mnli")):
        write_jsonl_atomic(tmp_path / "predictions" / f"{file}.jsonl", [line | {"task_id": f"{name}/1"}])
    answers = read_answers(tmp_path, "toy_pairs", {"of_task": "toy_pairs"})
    assert answers.missing == [] and [row["question"] for row in answers.rows] == ["premise 1\n\nhypothesis 1"]
    other = {"of_task": "toy_pairs", "predictions_sha256": "0", "data": "no/such.jsonl"}
    answers = read_answers(tmp_path, "mnli", other)
    assert [row["question"] for row in answers.rows] == [None] and "texts of mnli are not at hand" in answers.missing[1]
    assert answers.missing[0] == "the predictions have changed since they were graded"
    write_jsonl_atomic(texts, [{"task_id": "toy_pairs/1", "texts": 3}, {"texts": []}])
    assert (
        "texts of toy_pairs are not at hand" in read_answers(tmp_path, "toy_pairs", {"of_task": "toy_pairs"}).missing[0]
    )
    texts.write_text("{")
    assert "texts.jsonl" in read_answers(tmp_path, "toy_pairs", {"of_task": "toy_pairs"}).missing[0]


def test_a_harness_score_has_no_answers_and_its_own_scale(tmp_path):
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: gold, items=5)
    metrics = {"acc_norm": 0.5, "word_perplexity": 12.0}
    score = {"task": "harness/x", "version": "1", "n": 5, "invalid": 0, "metrics": metrics}
    write_json_atomic(run / "scores" / "harness" / "x.json", score)
    made = table_of_runs([run])
    shown = {column.metric: (column.unit, column.scale, column.better) for column in made.table.spec.columns}
    assert shown["acc_norm"] == ("%", 100.0, "higher") and shown["word_perplexity"] == ("", 1.0, "none")
    assert write_page(tmp_path / "page", made.table, made.sources, made.shown) == []


def test_the_metrics_of_runs_have_their_own_scales_and_directions(tmp_path):
    """KL and NLL are nats, less of a wrong rule is better, and what nobody knows is not ranked."""
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: gold, items=5)
    names = ("nll", "kl", "p_right", "p_wrong", "wrong_rule", "accuracy", "pass@10", "p_wrong_before", "unheard_of")
    score = {"task": "x", "version": "1", "n": 5, "invalid": 0, "metrics": dict.fromkeys(names, 0.5)}
    write_json_atomic(run / "scores" / "x.json", score)
    columns = {column.metric: column for column in table_of_runs([run]).table.spec.columns if column.task == "x"}
    assert {name: (one.unit, one.scale, one.better) for name, one in columns.items()} == {
        "nll": ("nats", 1.0, "lower"),
        "kl": ("nats", 1.0, "none"),
        "p_right": ("%", 100.0, "higher"),
        "p_wrong": ("%", 100.0, "lower"),
        "wrong_rule": ("%", 100.0, "lower"),
        "accuracy": ("%", 100.0, "higher"),
        "pass@10": ("%", 100.0, "higher"),
        "p_wrong_before": ("", 1.0, "none"),
        "unheard_of": ("", 1.0, "none"),
    }


def test_answers_that_changed_since_they_were_graded_are_told(tmp_path):
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: gold, items=5)
    scored = entry(tmp_path, "run", "toy")
    assert read_answers(run, "toy", scored).missing == []
    path = run / "completions" / "toy.jsonl"
    path.write_text(path.read_text().replace('"stop"', '"length"'))
    assert read_answers(run, "toy", scored).missing == ["the completions have changed since they were graded"]


def test_what_is_gone_or_damaged_is_said_and_the_rest_is_there(world, tmp_path):
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: gold, items=5)
    scored = entry(tmp_path, "run", "toy")
    (run / "grades" / "toy.jsonl").write_text('{"task_id": "toy/0"\n')
    answers = read_answers(run, "toy", scored)
    assert len(answers.rows) == 5 and not any(row["is_graded"] for row in answers.rows)
    assert (
        len(answers.missing) == 1 and "grades cannot be read" in answers.missing[0] and "line 1" in answers.missing[0]
    )
    (run / "grades" / "toy.jsonl").unlink()
    (run / "completions" / "toy.jsonl").unlink()
    assert read_answers(run, "toy", scored).missing == ["no completions and no grades at hand"]
    (run / "log.jsonl").write_text("[]")
    told = describe_run(ShownRun("run", {"status": "ok", "training": {"seconds": 1}, "config": {}}, run))
    assert len(told["missing"]) == 1 and "the log cannot be read" in told["missing"][0]


def test_odd_files_of_a_run_raise_nothing(tmp_path):
    """Whatever stands in a line: values of other types than ours."""
    lines = [
        {}, {"task_id": 3, "sample": "x", "completion": 7, "prompt": None, "finish_reason": {}},
        {"task_id": "toy/0", "metrics": 3, "extracted": [1], "groups": "x", "gold": {"a": 1}},
        {"task_id": "mt_bench/x/turny", "completion": None, "metrics": {"rating": None}},
    ]  # fmt: skip
    for folder in ("completions", "grades", "judgements"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mt_bench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = read_answers(tmp_path, "mt_bench", {"generation": {"template": "no such template"}})
    assert answers.kind == "judged" and len(answers.rows) == 4


@pytest.mark.parametrize("text", [*HOSTILE, "'", "\\", "\n", "\r"])
def test_a_script_file_gives_back_the_very_value(text):
    """Its string literal is taken apart as JavaScript takes it apart: no line ends in it, no quote ends it."""
    value = {"__proto__": text, text: [text, float("nan")]}
    made = script("name", value)
    literal = re.fullmatch(r"take\(\"name\", '(.*)'\);\n", made)[1]
    assert not re.search(r"[\n\r\u2028\u2029\ud800-\udfff]|(?<!\\)(?:\\\\)*'", literal)
    assert value_of(made) == {"__proto__": text, text: [text, None]}
    made.encode()


def test_no_text_is_parsed_as_html_and_nothing_foreign_may_run():
    ours = "".join((HERE / "static" / name).read_text() for name in SCRIPTS)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc", ours)
    assert ours.count("\n") < 1000
    assert "script-src 'self' file:;" in POLICY and "unsafe-eval" not in POLICY and "default-src 'none'" in POLICY
    templates = "".join(path.read_text() for path in (HERE / "templates").iterdir())
    assert not re.search(r"\|\s*safe|autoescape|\son\w+=|style=", templates)


def test_the_libraries_come_from_their_packages(root):
    files = libraries()
    assert b"globalThis.DataTable = " in files["datatables.js"] and b"MIT" in files["LICENSES.txt"]
    tracked = subprocess.run(["git", "ls-files", "*.js"], cwd=root, capture_output=True, text=True).stdout.split()
    assert tracked and all(name.startswith(("eval/page/static/", "results/toy/page/")) for name in tracked)


def test_runs_of_no_table_are_rows_by_what_differs(world):
    made = table_of_runs(find_runs([world]))
    wanted = [("minilm", "lora"), ("toy", "ba_lora"), ("toy", "full_ft"), ("toy", "lora"), ("toy", "pissa")]
    assert [(row.base, row.method) for row in made.table.spec.rows] == wanted
    assert not any(row.setting for row in made.table.spec.rows)
    row = made.table.spec.rows[3]
    cell = made.table.cells[row, "toy.strict"]
    assert cell.seeds == SEEDS and cell.values == (32.5, 32.5)
    with pytest.raises(UserError, match="no such run"):
        find_runs([world / "nothing"])


def test_a_setting_that_differs_makes_a_row_and_a_copy_has_its_name(tmp_path):
    for name, words in (("a", []), ("b", ["adapter.rank=4"]), ("c", [])):
        toy_run(tmp_path / name, "lora", 1, completion=lambda place, gold: gold, items=3, overrides=words)
    made = table_of_runs(find_runs([tmp_path]))
    assert [row.setting for row in made.table.spec.rows] == ["adapter.rank=8", "adapter.rank=4", "adapter.rank=8 c"]


@pytest.mark.parametrize("task", ["likelihood", "inheritance", "harness/xnli_es", "ranks/4/likelihood"])
def test_a_score_without_answers_leaves_no_gap(tmp_path, task):
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: gold, items=3)
    score = {"task": task, "version": "1", "n": 3, "metrics": {"p_right": 0.5}}
    at_rank, _, name = task.rpartition("/") if task.startswith("ranks/") else ("", "", task)
    write_json_atomic(run / at_rank / "scores" / f"{name}.json", score)
    write_jsonl_atomic(run / at_rank / "grades" / f"{name}.jsonl", [{"task_id": "a/0", "metrics": {"p_right": 0.5}}])
    made = table_of_runs(find_runs([run]))
    assert set(made.shown[0].evaluation) == {"toy", task}
    page = tmp_path / "page"
    assert write_page(page, made.table, made.sources, made.shown, changed=made.changed, missing=made.missing) == []
    assert len(list((page / "data").glob("answers-*"))) == 1


def test_the_page_of_runs_and_its_exit_status(world, tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["eval.report", *map(str, words)])
        return report()

    assert run("--runs", world / "toy-lora-s1", world / "toy-lora-s2", f"output={tmp_path / 'page'}") == 0
    index = (tmp_path / "page" / "index.html").read_text()
    assert "Content-Security-Policy" in index and 'href="#/cell/0/0"' in index and "not at hand" not in index
    items = sorted(path.name for path in (tmp_path / "page" / "data").glob("items-*"))
    assert items == ["items-0.js"]  # both runs were asked the same
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("method: [")
    assert run("--runs", world / "toy-lora-s1", tmp_path / "broken", f"output={tmp_path / 'page'}") == INCOMPLETE
    assert "broken is left out" in capsys.readouterr().err
    assert "broken is left out" in (tmp_path / "page" / "index.html").read_text()
    for words, told in (
        (["--runs", world, "x=3"], "takes folders and output=DIR"),
        (["--runs", world, "--inspect", world], "give a TABLE"),
        ([], "give a TABLE"),
        (["--runs", tmp_path / "broken", f"output={tmp_path / 'other'}"], "broken"),
        (["toy", "page=maybe"], "yes or no"),
        (["--runs", f"output={tmp_path / 'other'}"], "no run is named"),
        (["toy", "alow=stale"], r"^unknown key alow \(nearest: allow\)$"),
    ):
        with pytest.raises(UserError, match=told):
            run(*words)
    assert not (tmp_path / "other").exists()


def test_compare_prints_settings_scores_and_why_there_is_no_test(world, capsys):
    runs = [str(world / name) for name in ("toy-ba_lora-s1", "toy-ba_lora-s2", "toy-lora-s1", "toy-lora-s2")]
    assert compare.main(runs) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^seed +1 +2 +1 +2$", printed, flags=re.M) and "regularizers.lambda_svd" in printed
    assert re.search(r"^toy: strict +53\.75 ± 19\.45 \(2\) +32\.50 ± 0\.00 \(2\)$", printed, flags=re.M)
    line = next(line for line in printed.splitlines() if re.match(r"toy: strict +toy lora", line))
    assert "+21.25" in line and "no test: 2 seeds, 5 are needed" in line and f"of {ITEMS}" in line
    grades = {
        run: [
            json.loads(text)["metrics"]["strict"]
            for text in (world / run / "grades/toy.jsonl").read_text().splitlines()
        ]
        for run in ("toy-ba_lora-s1", "toy-ba_lora-s2", "toy-lora-s1", "toy-lora-s2")
    }
    ours, theirs = ([*zip(*(grades[f"toy-{m}-s{s}"] for s in SEEDS), strict=True)] for m in ("ba_lora", "lora"))
    better = [sum(a) - sum(b) for a, b in zip(ours, theirs, strict=True)]
    assert f"{sum(d > 0 for d in better)}, {sum(d < 0 for d in better)} of {ITEMS}" in line


def test_compare_tests_five_seeds_and_refuses_other_items(tmp_path, capsys):
    for method, base in (("lora", 3), ("pissa", 2)):
        for seed in range(5):

            def completion(place, gold, base=base, seed=seed):
                return f"The answer is: {gold if (place + seed) % base == 0 else 'none'}"

            toy_run(tmp_path / f"{method}-{seed}", method, seed, completion=completion, items=12)
    assert compare.main([str(tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if re.match(r"toy: strict +toy pissa", line))
    assert re.search(r"0\.\d{3}|< 0\.0001", line) and "no test" not in line
    rows = (tmp_path / "test.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(rows[:6]) + "\n")
    other = toy_run(tmp_path / "fewer", "dora", 1, completion=lambda place, gold: gold, items=6)
    compare.main([str(tmp_path / "lora-1"), str(other)])
    assert "no test: settings differ, see the notes" in capsys.readouterr().out


def test_a_page_takes_the_place_of_an_earlier_one_whole(world, tmp_path):
    made = table_of_runs(find_runs([world / "toy-lora-s1"]))
    write_page(tmp_path / "page", made.table, made.sources, made.shown)
    (tmp_path / "page" / "data" / "run-99.js").write_text("of an earlier page")
    write_page(tmp_path / "page", made.table, made.sources, made.shown)
    assert not (tmp_path / "page" / "data" / "run-99.js").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_a_page_deletes_no_folder_but_an_earlier_page(world, tmp_path, monkeypatch):
    """Whoever is to write it, it is refused at once: a run, a folder of one's own, a page with a file of one's own."""
    run = shutil.copytree(world / "toy-lora-s1", tmp_path / "run")
    made = table_of_runs([run])
    page = tmp_path / "page"
    page.mkdir()
    write_page(page, made.table, made.sources, made.shown)  # into an empty folder
    write_page(page, made.table, made.sources, made.shown)
    (page / ".git").mkdir()
    own = tmp_path / "own" / "data"
    own.mkdir(parents=True)
    (own / "rows.csv").write_text("1")
    before = sorted(tmp_path.rglob("*"))
    for folder, told in ((run, "holds completions"), (own.parent, "no earlier page"), (page, r"holds \.git")):
        monkeypatch.setattr("sys.argv", ["eval.report", "--runs", str(run), f"output={folder}"])
        for write in (
            lambda folder=folder: write_page(folder, made.table, made.sources, made.shown),
            lambda folder=folder: compare.main([str(run), f"output={folder}"]),
            report,
        ):
            with pytest.raises(UserError, match=told):
                write()
    with pytest.raises(UserError, match="unrecognized arguments: --page"):  # which took the next run for its folder
        compare.main(["--page", str(run), str(world / "toy-lora-s2")])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_score_is_named_and_the_rest_is_shown(tmp_path, capsys):
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: gold, items=3)
    for name, change in (("x", {}), ("y", {"metrics": [1]}), ("z", {"interval_95": [1]})):
        score = {"task": name, "version": "1", "n": 3, "metrics": {"accuracy": 0.5}}
        write_json_atomic(run / "scores" / f"{name}.json", score | change)
    made = table_of_runs([run])
    told = write_page(tmp_path / "page", made.table, made.sources, made.shown)
    assert [one for one in told if "damaged" in one] == [
        f"run: its score of {name} is damaged: score the run again" for name in ("y", "z")
    ]
    assert {"toy.strict", "x.accuracy"} <= {column.name for column in made.table.spec.columns}
    assert compare.main([str(run)]) == 0 and "x: accuracy" in capsys.readouterr().out
    train = read_json(run / "train.json")
    write_json_atomic(run / "train.json", train | {"training": [1]})
    with pytest.raises(UserError, match="run is left out: .* is damaged: its training is no mapping"):
        table_of_runs([run])


def test_a_prediction_without_a_label_is_not_graded(tmp_path):
    lines = [{"task_id": f"stsb/{n}", "label": label, "prediction": 2.5} for n, label in enumerate((None, 3.0))]
    write_jsonl_atomic(tmp_path / "predictions" / "best.jsonl", lines)
    answers = read_answers(tmp_path, "stsb", {"of_task": "stsb"})
    assert [(row["is_graded"], row["metrics"]) for row in answers.rows] == [(False, {}), (True, {"error": 0.5})]
    assert "1 predictions have no label" in answers.missing
    run = classified_run(tmp_path / "run")
    path = run / "predictions" / "best.jsonl"
    first, *others = read_jsonl(path)
    write_jsonl_atomic(path, [{key: first[key] for key in first if key != "label"}, *others])
    made = table_of_runs([run])
    assert write_page(tmp_path / "page", made.table, made.sources, made.shown) == [
        "run: sst2: 1 predictions have no label"
    ]


def test_a_long_logs_curve_has_fewer_points_and_lacks_nothing(tmp_path):
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: gold, items=3)
    write_jsonl_atomic(run / "log.jsonl", [{"step": step, "loss": 1.0} for step in range(1, 2 * MOST_POINTS + 2)])
    told = describe_run(ShownRun("run", {"training": {"seconds": 1}}, run))
    steps = told["log"]["step"]
    assert told["missing"] == [] and len(steps) <= MOST_POINTS and (steps[0], steps[-1]) == (1, 2 * MOST_POINTS + 1)
    assert told["facts"]["steps in the curves"] == f"{len(steps)} of {2 * MOST_POINTS + 1}"


def test_files_that_go_while_they_are_listed_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "stays").write_text("12")
    (tmp_path / "goes").write_text("")
    found = list(os.walk(tmp_path))
    monkeypatch.setattr(os, "walk", lambda folder: (tmp_path / "goes").unlink() or found)
    assert describe_run(ShownRun("run", {}, tmp_path))["files"] == [["stays", 2]]


def test_the_noise_floor_is_on_the_metrics_scale_and_not_claimed_without_answers(tmp_path):
    runs = [{"tasks": {"mt_bench": {"metric": "rating", "spread": 0.05}, "toy": {"metric": "strict", "spread": 0.02}}}]
    assert _noise(runs) == ["mt_bench, rating: 0.5 on the scale to 10 (1 runs)", "toy, strict: 2 points (1 runs)"]
    run = toy_run(tmp_path / "run", "lora", 1, completion=lambda place, gold: gold, items=3)
    for told in ("each run answered once", "Not known: answers are not at hand"):
        made = table_of_runs([run])
        write_page(tmp_path / "page", made.table, made.sources, made.shown)
        assert told in (tmp_path / "page" / "index.html").read_text()
        for folder in ("completions", "grades"):
            (run / folder / "toy.jsonl").unlink(missing_ok=True)


def test_the_committed_page_is_of_todays_scripts_and_templates(root):
    folder = root / "results" / "toy" / "page"
    assert (folder / "page.js").read_text() == own_script()
    assert (folder / "page.css").read_bytes() == (HERE / "static" / "page.css").read_bytes()
    figures = [
        one | {"is_drawn": (folder / "figures" / f"{one['name']}.png").is_file()}
        for one in read_json(root / "results" / "toy" / "table.json")["figures"]
    ]
    view = value_of((folder / "data" / "page.js").read_text())
    assert (folder / "index.html").read_text() == _render(view, figures)
