"""Comparisons of two rows by what their runs left: the items of each metric, and what may not be tested."""

import json

import numpy as np
import pytest
import sklearn.metrics

from ba_lora.config.layers import read_yaml
from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row, available_tables, find_table
from ba_lora.glue import find_task
from ba_lora.io import write_jsonl_atomic
from eval.metrics.bootstrap import weighted_metric
from eval.metrics.scores import METRICS
from eval.nlu_scores import score_predictions
from eval.page.view import item_values
from eval.report.columns import ReportColumn
from eval.report.crossed import crossed_t
from eval.report.table import build_table
from eval.tasks import get_task
from eval.tasks.mt_bench import to_grade
from tests.support.report_world import ITEMS, SEEDS, World, solved

ROWS = (Row("tiny", "lora"), Row("tiny", "ba_lora"))
FEW = "3 seeds, 5 are needed"


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def add(world, method, seed, sets, *, of_task, file="best", training_counts=None):
    """Write a classifier's run. sets: name → (labels, predictions)."""
    entries, lines = {}, []
    for name, (labels, predictions) in sets.items():
        pairs = enumerate(zip(labels, predictions, strict=True))
        of_set = [{"task_id": f"{name}/{i}", "label": y, "prediction": p, "logits": [0.0] * 3} for i, (y, p) in pairs]
        score = score_predictions(
            of_set, name=name, of_task=of_task, training_counts=training_counts, imbalanced=training_counts is not None
        )
        entries[name] = json.loads(json.dumps(score)) | {"data_sha256": "t1"}
        if file != "best":
            entries[name]["predictions_sha256"] = "as in the file"
        lines += of_set
    run = world.add(method, seed, grades=None, evaluation=entries)
    write_jsonl_atomic(run.run_path / "predictions" / f"{file}.jsonl", lines)
    return run


def spec(world, *columns, seeds=SEEDS):
    runs = {
        (row, column.name): tuple(world.run(row.method, seed) for seed in seeds)
        for row in ROWS
        for column in columns
        if not column.mean_of
    }
    return world.spec(rows=ROWS, columns=columns, runs=runs, paper=())


def compare(world, *columns, seeds=SEEDS):
    made = spec(world, *columns, seeds=seeds)
    return {one.column: one for one in build_table(made, world.sources(made)).comparisons}


def noisy(labels, share_right, seed):
    random = np.random.default_rng(seed)
    drawn = random.integers(0, max(labels) + 1, len(labels))
    return np.where(random.random(len(labels)) < share_right, labels, drawn).tolist()


def test_accuracy_is_tested_as_the_same_grades_are(world):
    """The known case of tests/support/report_world.py, once graded, once as predictions of a classifier."""
    for method in ("lora", "ba_lora"):
        for seed in SEEDS:
            world.add(method, seed)
    graded = compare(world, ReportColumn("x", "x", task="gsm8k", metric="strict"))["x"]
    labels = [item % 2 for item in range(ITEMS)]
    for method in ("lora", "ba_lora"):
        for seed in SEEDS:
            right = solved(method, seed)
            predictions = [y if grade else 1 - y for y, grade in zip(labels, right, strict=True)]
            add(world, method, seed, {"sst2": (labels, predictions)}, of_task="sst2")
    assert compare(world, ReportColumn("x", "x", task="sst2", metric="accuracy"))["x"] == graded
    assert (graded.untested, graded.num_items, graded.p) == ("no spread", ITEMS, None)
    assert graded.difference == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    "damaged", ["{", '{"task_id": "sst2/0", "label": 1}', '{"task_id": "sst2/0", "label": 1, "prediction": null}']
)
def test_damaged_predictions_leave_a_comparison_without_items(world, damaged):
    labels = [item % 2 for item in range(ITEMS)]
    for method in ("lora", "ba_lora"):
        for seed in SEEDS:
            run = add(world, method, seed, {"sst2": (labels, noisy(labels, 0.5, seed))}, of_task="sst2")
    path = run.run_path / "predictions" / "best.jsonl"
    path.write_text(damaged + "\n" + path.read_text())
    found = compare(world, ReportColumn("x", "x", task="sst2", metric="accuracy"))["x"]
    assert found.untested in ("predictions cannot be read", "predictions are not finite") and found.num_items is None


def by_leaving_items_out(definition, ours, theirs, *, scale=100.0):
    """Return (low, high) of the comparison of runs' (labels, values), by the jackknife in a slow loop."""

    def pseudo(labels, values):
        labels, values = np.array(labels), np.array(values)
        whole, size = definition(labels, values)[0], len(labels)
        out = [definition(np.delete(labels, i), np.delete(values, i))[0] for i in range(size)]
        found = size * whole - (size - 1) * np.array(out)
        return scale * (found - found.mean() + whole)

    wanted = crossed_t([tuple(np.stack([pseudo(*run) for run in runs]) for runs in (ours, theirs))])
    return wanted.low, wanted.high


def macro_f1(labels, predictions):
    return sklearn.metrics.f1_score(labels, predictions, average="macro"), None


def recall_of_2(labels, predictions):
    return sklearn.metrics.recall_score(labels, predictions, labels=[2], average="macro", zero_division=np.nan), None


@pytest.mark.parametrize(
    ("of_task", "metric", "definition"),
    [
        ("cola", "matthews", METRICS["matthews"]),
        ("mrpc", "f1", METRICS["f1"]),
        ("stsb", "pearson", METRICS["pearson"]),
        ("stsb", "spearman", METRICS["spearman"]),
        ("mnli", "macro_f1", macro_f1),
        ("mnli", "minority_recall", recall_of_2),
        ("mnli", "per_class.recall.contradiction", recall_of_2),
        ("mnli", "per_class.macro_f1", macro_f1),
    ],
)
def test_metrics_over_all_items_by_a_slow_loop(world, of_task, metric, definition):
    random, is_regression = np.random.default_rng(0), of_task == "stsb"
    labels = random.integers(0, 2 if of_task in ("cola", "mrpc") else 3, 50).tolist()
    predictions = {}
    for method, share in (("lora", 0.5), ("ba_lora", 0.7)):
        for seed in SEEDS:
            found = noisy(labels, share, seed)
            if is_regression:
                found = (np.array(found) + random.normal(0, 0.5, 50)).tolist()
            predictions[method, seed] = found
            counts = {"entailment": 9, "neutral": 9, "contradiction": 1} if of_task == "mnli" else None
            add(world, method, seed, {of_task: (labels, found)}, of_task=of_task, training_counts=counts)
    test = compare(world, ReportColumn("x", "x", task=of_task, metric=metric))["x"]

    ours, theirs = ([(labels, predictions[method, seed]) for seed in SEEDS] for method in ("ba_lora", "lora"))
    assert (test.low, test.high) == pytest.approx(by_leaving_items_out(definition, ours, theirs))
    assert (test.num_items, len(test.seeds), test.untested) == (50, 3, FEW)
    assert test.low < test.difference < test.high


def add_drift(world, method, seed, nll, num_tokens):
    """Write a run whose texts have these negative log-likelihoods and lengths."""
    entry = {"perplexity": {"after": np.exp(sum(nll) / sum(num_tokens))}, "data_sha256": "t1"}
    run = world.add(method, seed, grades=None, evaluation={"inheritance": entry})
    texts = zip(nll, num_tokens, strict=True)
    lines = [{"task_id": f"text/{i}", "nll": x, "num_tokens": count} for i, (x, count) in enumerate(texts)]
    write_jsonl_atomic(run.run_path / "grades" / "inheritance_texts.jsonl", lines)
    return run


PERPLEXITY = ReportColumn("x", "x", task="inheritance", metric="perplexity.after", unit="", scale=1.0, better="lower")


def test_perplexity_by_a_slow_loop(world):
    random = np.random.default_rng(0)
    num_tokens = random.integers(5, 60, 80)
    runs = {}
    for method, mean in (("ba_lora", 0.5), ("lora", 0.7)):
        for seed in SEEDS:
            runs[method, seed] = num_tokens * random.normal(mean, 0.2, 80)
            add_drift(world, method, seed, runs[method, seed].tolist(), num_tokens.tolist())
    test = compare(world, PERPLEXITY)["x"]

    ours, theirs = ([(num_tokens, runs[method, seed]) for seed in SEEDS] for method in ("ba_lora", "lora"))
    wanted = by_leaving_items_out(lambda n, nll: (np.exp(nll.sum() / n.sum()),), ours, theirs, scale=1.0)
    assert (test.low, test.high) == pytest.approx(wanted)
    assert (test.num_items, len(test.seeds), test.untested) == (80, 3, FEW)
    assert test.low < test.difference < test.high < 0


@pytest.mark.parametrize("case", ["no likelihoods at hand", "likelihoods are not those of the score", "other items"])
def test_perplexity_that_cannot_be_tested_says_why(world, case):
    for seed in SEEDS:
        add_drift(world, "lora", seed, [3.0, 4.0], [5, 6])
        run = add_drift(world, "ba_lora", seed, [3.0, 5.0], [5, 6] if case != "other items" else [5, 7])
    path = run.run_path / "grades" / "inheritance_texts.jsonl"
    if case == "no likelihoods at hand":
        path.write_text(path.read_text().replace("5.0", "null"))
    elif case == "likelihoods are not those of the score":
        path.write_text(path.read_text().replace("5.0", "5.5"))
    found = compare(world, PERPLEXITY)["x"]
    assert (found.untested, found.num_items, found.p) == (case, None, None)
    assert found.low is found.high is None  # the seeds are alike here


def test_the_sets_of_a_mean_are_samples_by_themselves_and_columns_on_one_set_are_one(world):
    """On one set the second column loses what the first gains: their mean cannot move. On two sets it does."""
    labels = [item % 2 for item in range(200)]
    better, worse = noisy(labels, 0.8, 1), noisy(labels, 0.6, 2)
    for method, first, second in (("ba_lora", better, worse), ("lora", worse, better)):
        for seed in SEEDS:
            add(world, method, seed, {"mrpc": (labels, first), "rte": (labels, second)}, of_task="mrpc")
    columns = [
        ReportColumn("one", "one", task="mrpc", metric="accuracy"),
        ReportColumn("other", "other", task="rte", metric="accuracy"),
        ReportColumn("mean", "mean", mean_of=("one", "other"), scale=1.0),
        ReportColumn("itself", "itself", mean_of=("one", "one"), scale=1.0),
    ]
    found = compare(world, *columns)
    width = {name: test.high - test.low for name, test in found.items()}
    assert found["mean"].difference == 0.0 and found["mean"].num_items == 400
    assert width["mean"] == pytest.approx(width["one"] / 2**0.5, rel=0.1)  # √(σ² + σ²) / 2
    assert (found["itself"].low, found["itself"].high) == pytest.approx((found["one"].low, found["one"].high))
    assert found["itself"].num_items == 200
    for method, first, second in (("ba_lora", better, worse), ("lora", worse, better)):
        for seed in SEEDS:
            run = world.run(method, seed)
            world.edit(run, **{"evaluation/mrpc/metrics/swapped": np.mean(np.equal(labels, second))})
            graded = [
                {"task_id": f"mrpc/{i}", "metrics": {"accuracy": float(y == a), "swapped": float(y == b)}}
                for i, (y, a, b) in enumerate(zip(labels, first, second, strict=True))
            ]
            write_jsonl_atomic(run.run_path / "grades" / "mrpc.jsonl", graded)
            entry = json.loads(run.result_path.read_text())["evaluation"]["mrpc"]
            entry.pop("of_task")
            world.edit(run, **{"evaluation/mrpc": entry})
    columns[1] = ReportColumn("other", "other", task="mrpc", metric="swapped")
    found = compare(world, *columns)
    assert (found["mean"].untested, found["mean"].low, found["mean"].num_items) == ("no spread", None, 200)


def test_a_mean_with_a_part_that_has_no_items_says_which(world):
    for method in ("lora", "ba_lora"):
        for seed in SEEDS:
            add(world, method, seed, {"cola": ([0, 1] * 5, [0, 1] * 5)}, of_task="cola")
    columns = (
        ReportColumn("cola", "CoLA", task="cola", metric="matthews"),
        ReportColumn("hours", "time", metric="training.seconds"),
        ReportColumn("mean", "mean", mean_of=("cola", "hours")),
    )
    assert compare(world, *columns)["mean"].untested == "time: no mean over items"


def test_out_of_domain_predictions_have_a_file_of_their_own(world):
    labels = [0, 1] * 20
    for method, share in (("lora", 0.5), ("ba_lora", 0.9)):
        for seed in SEEDS:
            add(world, method, seed, {"imdb": (labels, noisy(labels, share, seed))}, of_task="sst2", file="imdb")
    test = compare(world, ReportColumn("x", "x", task="imdb", metric="accuracy"))["x"]
    assert (test.untested, test.num_items) == (FEW, 40) and test.low > 0


def test_a_metric_that_hangs_on_one_item_has_no_items(world):
    """One of eight labels is 1: without it Matthews is undefined, and the interval is that of the seeds."""
    for method in ("lora", "ba_lora"):
        for seed in SEEDS:
            predictions = [0] * 7 + [1] if method == "ba_lora" else [0] * (7 - seed) + [1] * (1 + seed)
            add(world, method, seed, {"cola": ([0] * 7 + [1], predictions)}, of_task="cola")
    test = compare(world, ReportColumn("cola", "CoLA", task="cola", metric="matthews"))["cola"]
    assert (test.untested, test.num_items) == ("undefined without one of the items", None) and test.low is not None


@pytest.mark.parametrize("case", ["absent", "changed", "null", "other items", "no metric"])
def test_what_cannot_be_tested_says_why(world, case):
    wanted = {
        "absent": "no predictions at hand",
        "changed": "predictions are not those of the score",
        "null": "predictions are not finite",
        "other items": "other items",
        "no metric": "no metric over items",
    }[case]
    labels = [0, 1] * 5
    for seed in SEEDS:
        add(world, "lora", seed, {"cola": (labels, noisy(labels, 0.7, 1))}, of_task="cola")
        run = add(world, "ba_lora", seed, {"cola": (labels, noisy(labels, 0.7, 2))}, of_task="cola")
    path = run.run_path / "predictions" / "best.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    metric = "matthews"
    if case == "absent":
        path.unlink()
    elif case == "changed":
        write_jsonl_atomic(path, [line | {"prediction": 1 - line["label"]} for line in lines])
    elif case == "null":
        write_jsonl_atomic(path, [lines[0] | {"prediction": None}, *lines[1:]])
    elif case == "other items":
        write_jsonl_atomic(path, [line | {"task_id": line["task_id"] + "x"} for line in lines])
    else:
        metric = "n"
    found = compare(world, ReportColumn("x", "x", task="cola", metric=metric))["x"]
    assert (found.untested, found.p, found.p_adjusted, found.num_items) == (wanted, None, None, None)


MT_BENCH_RATINGS = {  # question → the judgements of turn 1, of turn 2; −1: without a rating
    81: ([8], [6]),
    82: ([5], [-1]),
    83: ([-1], [9]),
    84: ([-1], [-1]),
    85: ([2], [3]),
    86: ([9, 4], [7, -1]),
}


def add_mt_bench(world, method, seed, ratings):
    """Write the grades of MT-Bench answers, and the score as its task computes it from them."""
    task = get_task("mt_bench")
    rows = [{"question_id": number, "category": "writing", "turns": ["One?", "Two?"]} for number in ratings]
    items = task.items_from_rows(rows, source="made up")
    grades = [to_grade(item, ratings[item.meta["question_id"]][item.meta["turn"] - 1]) for item in items]
    score = task.aggregate(items, [[grade] for grade in grades]) | {"version": task.version, "data_sha256": "t1"}
    run = world.add(method, seed, grades=None, evaluation={"mt_bench": score})
    lines = [
        {"task_id": item.task_id, "sample": 0, "metrics": grade.metrics, "invalid": grade.invalid}
        for item, grade in zip(items, grades, strict=True)
    ]
    write_jsonl_atomic(run.run_path / "grades" / "mt_bench.jsonl", lines)
    return score["metrics"].get("rating")


def test_answers_without_a_rating_count_neither_above_nor_below_the_line(world):
    """Leaving a question out leaves out its ratings and their number; one without any changes nothing."""
    whole = {number: ([5], [4 + number % 3]) for number in MT_BENCH_RATINGS}
    for seed in SEEDS:
        ours = add_mt_bench(world, "ba_lora", seed, MT_BENCH_RATINGS)
        difference = ours - add_mt_bench(world, "lora", seed, whole)
    columns = (
        ReportColumn("mt_bench", "MT-Bench", task="mt_bench", metric="rating", unit="points", scale=10.0),
        ReportColumn("mean", "mean", mean_of=("mt_bench", "mt_bench"), scale=1.0),
    )
    found = compare(world, *columns)
    test = found["mt_bench"]
    assert (test.untested, test.num_items) == (FEW, 6) and test.difference == pytest.approx(10 * difference)
    assert (found["mean"].low, found["mean"].high) == pytest.approx((test.low, test.high))
    # (number, sum) of the rated turns: 8 + 6; 5; 9; none; 2 + 3; (9 + 4) / 2 + 7.
    rated = (np.array([2, 1, 1, 0, 2, 2]), np.array([14, 5, 9, 0, 5, 13.5]))
    others = (np.full(6, 2), np.array([5 + 4 + number % 3 for number in MT_BENCH_RATINGS]))
    wanted = by_leaving_items_out(lambda n, x: (x.sum() / n.sum(),), [rated] * 3, [others] * 3, scale=1.0)
    assert (test.low, test.high) == pytest.approx(wanted)


def test_a_score_in_which_the_judge_rated_nothing_has_no_items(world):
    whole = {number: ([5], [4 + number % 3]) for number in MT_BENCH_RATINGS}
    column = ReportColumn("mt_bench", "MT-Bench", task="mt_bench", metric="rating", unit="points", scale=10.0)
    for seed in SEEDS:
        add_mt_bench(world, "lora", seed, whole)
        add_mt_bench(world, "ba_lora", seed, dict.fromkeys(whole, ([-1], [-1])))
    made = spec(world, column)
    found = item_values(build_table(made, world.sources(made)), world.sources(made))["mt_bench"]
    assert found["untested"] == {world.run("ba_lora", seed).run_id: "no value in the score" for seed in SEEDS}
    assert found["runs"].keys() == {world.run("lora", seed).run_id for seed in SEEDS}


def test_a_classifiers_score_by_another_version_is_stale(world):
    for method in ("lora", "ba_lora"):
        run = add(world, method, 1, {"cola": ([0, 1], [0, 1])}, of_task="cola")
        world.edit(run, **{"evaluation/cola/version": "0"})
    with pytest.raises(UserError, match="cola is stale: graded by version 0 of cola, which is at version"):
        compare(world, ReportColumn("x", "x", task="cola", metric="matthews"), seeds=(1,))


def test_a_classifiers_sample_of_a_set_stands_beside_no_whole_set(world):
    column = ReportColumn("x", "x", task="cola", metric="matthews")
    runs = [add(world, method, 1, {"cola": ([0, 1], [0, 1])}, of_task="cola") for method in ("lora", "ba_lora")]
    of_sample = {"evaluation/cola/partial": True, "evaluation/cola/num_missing": 5}
    of_sample |= {"evaluation/cola/generation": {"limit": 2}, "config/eval": {"limit": 2}}
    world.edit(runs[0], **of_sample)
    with pytest.raises(UserError, match="limit differs in column x: 2 .*; null"):
        compare(world, column, seeds=(1,))
    world.edit(runs[1], **of_sample)
    made = spec(world, column, seeds=(1,))
    notes = build_table(made, world.sources(made)).footnotes
    assert notes == ("partial: a sample of 2 items (eval.limit), 5 left out",)


def test_every_metric_of_the_nlu_tables_can_be_tested():
    """No column of a GLUE table is left without a test for want of a form of its metric, but for the NLL: it needs the
    logits, and the tables that show it tell its spread."""

    classes = find_task("mnli").labels
    seen = set()
    for name in available_tables():
        config = read_yaml(find_table(name))
        if config["kind"] != "nlu":
            continue
        metrics = {
            column["metric"]
            for column in config["columns"].values()
            if "task" in column and column["task"] != "likelihood"
        }  # which is compared item by item
        metrics.discard("nll")
        assert all(weighted_metric(metric, classes=classes, minority="neutral") for metric in metrics), name
        seen |= metrics
    assert {"accuracy", "f1", "matthews", "pearson", "spearman", "macro_f1", "minority_recall"} <= seen
