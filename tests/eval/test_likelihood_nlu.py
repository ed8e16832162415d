"""Right and wrong labels' probabilities of classifiers: by hand, and of runs that start from a base with its head."""

import math
import sys

import numpy as np
import pytest

from ba_lora.config.layers import load_run
from ba_lora.errors import UserError
from ba_lora.experiments.evaluation_state import evaluation_fault, evaluation_state
from ba_lora.experiments.pipeline import record_evaluation
from ba_lora.experiments.plan import ask_evaluators, dry_run, plan_runs
from ba_lora.experiments.stages import evaluation_stages
from ba_lora.experiments.tables import find_table, load_table
from ba_lora.io import read_json, read_jsonl, sha256_file, write_jsonl_atomic
from data import lab_nlu
from data.lab_nlu import LabRows, folder_of, make_classifier
from eval import likelihood_nlu
from eval.report.spec import table_spec
from tests.support.tiny_nlu import tiny_overrides


def test_values_by_hand():
    before, after = np.log([[0.5, 0.25, 0.25]]), np.log([[0.2, 0.2, 0.6]])
    (row,) = likelihood_nlu.label_values(before, after, np.array([2]), np.array([0]))
    assert row["p_right"] == pytest.approx(0.6) and row["p_wrong"] == pytest.approx(0.2)
    assert row["p_wrong_before"] == pytest.approx(0.5) and row["accuracy"] == 1.0
    assert row["nll"] == pytest.approx(-math.log(0.6))
    assert row["kl"] == pytest.approx(0.5 * math.log(2.5) + 0.25 * math.log(1.25) + 0.25 * math.log(0.25 / 0.6))


@pytest.fixture
def lab(tmp_path, tiny_encoder, monkeypatch):
    """A base on the tiny encoder, and the rows that it predicted."""
    monkeypatch.setitem(lab_nlu.NUM_ROWS, "toy_pairs", {"start": 32, "base": 64})
    monkeypatch.setattr(lab_nlu, "NUM_ITEMS", dict.fromkeys(lab_nlu.NUM_ITEMS, 2))
    for name, rows in LabRows().shared().items():
        write_jsonl_atomic(tmp_path / f"{name}.jsonl", rows)
    words = [word for word in tiny_overrides(tiny_encoder, method="full_ft") if not word.startswith("trainer")]
    make_classifier(LabRows(), 7, 40, tmp_path, words=words)
    return tmp_path


def run_words(lab, *more):
    data = lab / "test.jsonl"
    words = [f"data.source={lab / 'finetune.jsonl'}", f"data.dev.toy_pairs={data}", f"eval.data.likelihood={data}"]
    return [*words, "eval.tasks=[likelihood]", "trainer.num_train_epochs=1", "export.merged=false", *more]


def measure(monkeypatch, data, *runs):
    monkeypatch.setattr(sys, "argv", ["likelihood_nlu", "--run", *map(str, runs), "--data", str(data)])
    likelihood_nlu.main()
    return [read_json(run / "scores" / "likelihood.json") for run in runs]


def test_a_run_starts_from_the_head_of_its_base(lab, train_nlu, monkeypatch):
    """Tuned with next to no learning rate it is its base: head and encoder have survived."""
    base = folder_of(lab, 7, 40)
    still = [
        train_nlu(*run_words(lab, "trainer.learning_rate=1.0e-9", *more), method=method, name=method, model=base)
        for method, *more in (("lora",), ("ba_lora", "seed=5"), ("full_ft", "export.merged=true"))
    ]
    moved = train_nlu(*run_words(lab, "trainer.learning_rate=0.01"), method="lora", name="moved", model=base)
    *same, other = measure(monkeypatch, lab / "test.jsonl", *still, moved)
    for score in same:
        assert score["metrics"]["p_wrong"] == pytest.approx(score["metrics"]["p_wrong_before"], abs=1e-4)
        assert abs(score["metrics"]["kl"]) < 1e-5 < other["metrics"]["kl"]
    expected = read_json(base / "lab.json")["p_wrong"]
    assert same[0]["groups"]["role"]["uncorrected"]["metrics"]["p_wrong_before"] == pytest.approx(expected, abs=1e-4)
    assert set(other["groups"]["role"]) == {"corrected", "uncorrected", "tuned", "unseen"} and 0 <= other["ece"] <= 1
    grades = read_jsonl(moved / "grades" / "likelihood.jsonl")
    assert len(grades) == other["n"] == len(read_jsonl(lab / "test.jsonl"))
    mean = sum(line["metrics"]["p_wrong"] for line in grades) / len(grades)
    assert mean == pytest.approx(other["metrics"]["p_wrong"]) and set(grades[0]["groups"]) == {"role", "kind"}

    config = load_run(moved)
    config.results_dir = str(lab / "results")
    (stage,) = evaluation_stages([config])
    assert stage.call.words == ["--run", str(moved), "--data", str(lab / "test.jsonl")]
    state = evaluation_state(config)
    assert evaluation_fault(config, state).reason == "not evaluated"
    result = record_evaluation(config, state)
    assert result["evaluation"]["likelihood"]["base_sha256"] == sha256_file(base / "model.safetensors")
    assert evaluation_fault(config, evaluation_state(config)) is None

    with pytest.raises(UserError, match="was evaluated on other rows than --data: set data.dev.toy_pairs"):
        measure(monkeypatch, lab / "valid.jsonl", moved)
    with pytest.raises(UserError, match="every row needs label, wrong, role and kind"):
        write_jsonl_atomic(lab / "plain.jsonl", [{"label": 0}])
        measure(monkeypatch, lab / "plain.jsonl", moved)
    for path in (base / "predictions").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="has no predictions for --data .*python -m data.lab_nlu makes both"):
        measure(monkeypatch, lab / "test.jsonl", moved)


def test_likelihood_needs_its_rows(lab, train_nlu):
    words = [word for word in run_words(lab) if not word.startswith("eval.data")]
    with pytest.raises(UserError, match="likelihood needs the rows it is measured on: eval.data.likelihood=FILE"):
        train_nlu(*words, method="lora", model=folder_of(lab, 7, 40))


ARMS = {"full_ft", "full_ba", "lora", "lora_ba", "pissa", "ba_lora", "nmtune"}


def test_the_tables_are_declared_and_a_dry_run_tells_their_cost():
    table = load_table(find_table("inheritance_nlu"))
    assert {row.method for row in table.rows} == ARMS and len(table.specs()) == 15 * len(ARMS)
    declared = {one.name: one for one in table_spec(table).hypotheses}
    assert [name for name, one in declared.items() if one.primary] == ["H1", "H2", "H5"] and declared["H0"].condition
    assert all(one.levels == ("noise=40", "noise=0") for one in declared.values())
    for spec in table.specs():
        assert spec.config.data.dev["toy_pairs"] == spec.config.eval.data["likelihood"]
        assert (spec.config.regularizers.lambda_mode == "gradient_share") == spec.method.endswith(("_ba", "ba_lora"))
    missing = ["eval.data.likelihood=nowhere.jsonl"]
    unmade = load_table(find_table("inheritance_nlu"), overrides=missing)
    planned = plan_runs(unmade, ask_evaluators(unmade, prepared=False))
    assert not any(entry.refused for entry in planned)  # the files are made first
    assert all("no such file" in entry.refused for entry in plan_runs(unmade, ask_evaluators(unmade)))
    lines = dry_run(table, planned)
    assert any(line.startswith("cost of the whole, as its file says: ") for line in lines)
    real = load_table(find_table("inheritance_nlu_sst2"))
    hypotheses = table.report["hypotheses"]
    assert {row.method for row in real.rows} == ARMS and real.report["hypotheses"] == hypotheses and not real.prepare
    tuning = load_table(find_table("inheritance_nlu_tuning"))
    assert {row.method for row in tuning.rows} == ARMS and table_spec(tuning).choose == "nll"
    assert all(spec.config.eval.data["likelihood"].endswith("valid.jsonl") for spec in tuning.specs())


def test_without_its_files_a_table_that_makes_none_is_refused():
    table = load_table(find_table("inheritance_nlu_sst2"), overrides=["eval.data.likelihood=nowhere.jsonl"])
    refused = {entry.refused for entry in plan_runs(table, ask_evaluators(table))}
    assert len(refused) == 1 and "eval.data.likelihood: no such file: " in refused.pop()
