"""eval/metrics: equal to scikit-learn and scipy, loadable by `evaluate` offline, nothing undefined is silent."""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from ba_lora.errors import UserError
from eval.metrics import class_scores, glue_scores, intervals
from eval.metrics.bootstrap import WEIGHTED, _recall
from eval.metrics.scores import METRICS
from eval.tasks.base import bootstrap_intervals

CLASSES = ("entailment", "neutral", "contradiction")


def draw(num_classes: int, *, num_items: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, num_classes, num_items)
    return labels, np.where(random.random(num_items) < 0.6, labels, random.integers(0, num_classes, num_items))


def draw_scores(*, num_items: int = 150, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, as STS-B's."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 11, num_items) / 2
    return labels, np.round(labels + random.normal(0, 1, num_items), 1)


def test_values_by_hand() -> None:
    labels, predictions = [1, 1, 1, 0, 0], [1, 1, 0, 0, 1]  # TP 2, FN 1, TN 1, FP 1
    found = glue_scores(["accuracy", "f1", "matthews"], labels, predictions)
    assert found.metrics == pytest.approx({"accuracy": 0.6, "f1": 2 / 3, "matthews": (2 - 1) / 6}) and not found.notes
    found = glue_scores(["pearson", "spearman"], [1.0, 2.0, 3.0], [1.0, 2.0, 9.0])
    assert found.metrics == pytest.approx({"pearson": 8 / (2 * 38) ** 0.5, "spearman": 1.0})
    scores, recall = class_scores([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], classes=CLASSES, minority="contradiction")
    assert recall == {"entailment": 0.5, "neutral": 1.0, "contradiction": 0.0}
    assert scores.metrics == pytest.approx({"macro_f1": (0.5 + 0.8 + 0) / 3, "minority_recall": 0.0})


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_libraries(seed: int) -> None:
    labels, predictions = draw(2, seed=seed)
    found = glue_scores(["accuracy", "f1", "matthews"], labels, predictions).metrics
    assert found["accuracy"] == sklearn_metrics.accuracy_score(labels, predictions)
    assert found["f1"] == sklearn_metrics.f1_score(labels, predictions)
    assert found["matthews"] == sklearn_metrics.matthews_corrcoef(labels, predictions)
    labels, predictions = draw_scores(seed=seed)
    found = glue_scores(["pearson", "spearman"], labels, predictions).metrics
    assert found["pearson"] == stats.pearsonr(labels, predictions)[0]
    assert found["spearman"] == stats.spearmanr(labels, predictions)[0]
    labels, predictions = draw(3, seed=seed)
    scores, recall = class_scores(labels, predictions, classes=CLASSES, minority="neutral")
    assert list(recall.values()) == sklearn_metrics.recall_score(labels, predictions, average=None).tolist()
    assert scores.metrics["macro_f1"] == sklearn_metrics.f1_score(labels, predictions, average="macro")
    assert scores.metrics["minority_recall"] == recall["neutral"]


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli_mm", "qnli", "rte", "wnli"])
def test_evaluate_loads_the_local_module(root, task: str, tmp_path, monkeypatch) -> None:
    import evaluate

    monkeypatch.chdir(tmp_path)
    module = evaluate.load(str(root / "eval" / "metrics" / "glue.py"), task, cache_dir=str(tmp_path))
    if task == "stsb":
        labels, predictions = draw_scores()
        expected = glue_scores(["pearson", "spearman"], labels, predictions)
    else:
        labels, predictions = draw(3 if task.startswith("mnli") else 2)
        names = {"cola": ["matthews"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}.get(task, ["accuracy"])
        expected = glue_scores(names, labels, predictions)
    assert module.compute(references=labels, predictions=predictions) == {**expected.metrics, "notes": {}}


def test_evaluate_refuses_an_unknown_task(root, tmp_path) -> None:
    import evaluate

    with pytest.raises(ValueError, match="unknown task 'sst3': choose one of cola"):
        evaluate.load(str(root / "eval" / "metrics" / "glue.py"), "sst3", cache_dir=str(tmp_path))


def test_evaluate_loads_the_per_class_module(root, tmp_path) -> None:
    import evaluate

    labels, predictions = draw(3)
    module = evaluate.load(str(root / "eval" / "metrics" / "per_class.py"), cache_dir=str(tmp_path))
    found = module.compute(references=labels, predictions=predictions, classes=list(CLASSES), minority="neutral")
    scores, recall = class_scores(labels, predictions, classes=CLASSES, minority="neutral")
    assert found == {**scores.metrics, "recall": recall, "notes": {}}


def test_every_task_has_metrics_that_exist() -> None:
    from ba_lora.glue import TASKS
    from eval.metrics.glue import TASK_METRICS

    assert {"mnli", "mnli_mm", "stsb"} < set(TASK_METRICS)
    assert all(set(task.metrics) <= set(METRICS) for task in TASKS.values())


@pytest.mark.parametrize(
    ("name", "labels", "predictions", "value", "note"),
    [
        ("matthews", [1, 1, 1], [1, 0, 1], None, "all 3 labels are of class 1"),
        ("matthews", [1, 0, 1], [1, 1, 1], 0.0, "0 by convention: every prediction is class 1"),
        ("f1", [0, 0], [0, 0], None, "no row is positive"),
        ("pearson", [1.0, 2.0], [3.0, 3.0], None, "all 2 predictions are 3"),
        ("spearman", [2.5, 2.5], [3.0, 1.0], None, "all 2 labels are 2.5"),
        ("pearson", [1.0], [3.0], None, "at least two rows"),
    ],
)
def test_what_is_undefined_says_so(name: str, labels: list, predictions: list, value: float | None, note: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = glue_scores([name], labels, predictions)
    assert found.metrics == {name: value} and note in found.notes[name]


def test_a_class_without_rows_has_no_recall() -> None:
    scores, recall = class_scores([0, 0, 1], [0, 1, 1], classes=CLASSES, minority="contradiction")
    assert recall["contradiction"] is None and scores.metrics["minority_recall"] is None
    assert "no row is of class contradiction" in scores.notes["minority_recall"]


def test_nan_predictions_are_an_error() -> None:
    with pytest.raises(UserError, match="2 of 4 predictions are NaN or infinite, the first in row 1"):
        glue_scores(["pearson"], [1.0, 2.0, 3.0, 4.0], [1.0, float("nan"), 3.0, float("inf")])
    with pytest.raises(UserError, match="3 labels and 2 predictions"):
        glue_scores(["accuracy"], [1, 0, 1], [1, 0])
    with pytest.raises(UserError, match="no rows"):
        glue_scores(["accuracy"], [], [])


@pytest.mark.parametrize("seed", range(3))
def test_weighted_forms_are_the_definitions(seed: int) -> None:
    """With counts as weights each fast form gives the definition's value on the repeated items."""
    random = np.random.default_rng(seed)
    counts = random.integers(0, 4, (5, 120)).astype(float)
    counts[0] = 1
    for name, weighted in WEIGHTED.items():
        labels, predictions = draw_scores(num_items=120) if name in ("pearson", "spearman") else draw(2, num_items=120)
        if name == "macro_f1":
            labels, predictions = draw(3, num_items=120)
        for row, value in zip(counts, weighted(counts, labels, predictions), strict=True):
            repeated = np.repeat(labels, row.astype(int)), np.repeat(predictions, row.astype(int))
            if name == "macro_f1":
                expected = sklearn_metrics.f1_score(*repeated, average="macro")
            else:
                expected = METRICS[name](*repeated)[0]
            assert value == pytest.approx(expected, abs=1e-12), name
    labels, predictions = draw(3, num_items=120)
    found = _recall(counts, labels, predictions, of=2)
    for row, value in zip(counts.astype(int), found, strict=True):
        repeated = np.repeat(labels, row), np.repeat(predictions, row)
        assert value == pytest.approx(sklearn_metrics.recall_score(*repeated, labels=[2], average="macro"))


def test_constant_predictions_leave_a_correlation_undefined() -> None:
    labels, predictions = np.array([1.1, 2.2, 3.3, 3.3]), np.array([0.1, 0.1, 0.1, 0.7])
    counts = np.array([[1.0, 1, 2, 0], [0, 0, 2, 2], [1, 1, 1, 1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        for name in ("pearson", "spearman"):
            assert np.isnan(WEIGHTED[name](counts, labels, predictions)).tolist() == [True, True, False], name


def test_intervals() -> None:
    labels, predictions = draw(2)
    found = intervals(["accuracy", "matthews", "minority_recall"], labels, predictions, minority=1)
    by_items = bootstrap_intervals([{"accuracy": float(a == b)} for a, b in zip(labels, predictions, strict=True)])
    assert found["accuracy"] == by_items["accuracy"]
    for name, value in glue_scores(["accuracy", "matthews"], labels, predictions).metrics.items():
        low, high = found[name]
        assert low < value < high
    assert intervals(["matthews"], [1, 1, 1], [1, 0, 1]) == {"matthews": None}


def test_interval_of_a_correlation_covers_the_truth() -> None:
    """Of 40 samples from a population with ρ = 0.8, about 95 % of the intervals hold it."""
    random, covered = np.random.default_rng(0), 0
    for _ in range(40):
        labels = random.normal(size=100)
        predictions = 0.8 * labels + 0.6 * random.normal(size=100)
        low, high = intervals(["pearson"], labels, predictions)["pearson"]
        covered += low < 0.8 < high
    assert 33 <= covered <= 40
