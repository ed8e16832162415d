"""Which of several faults counts, and that the command which it asks for fixes it."""

import dataclasses

import pytest

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.experiments.evaluation_state import STATE_FILE, Fault, evaluation_fault, evaluation_state
from ba_lora.experiments.pipeline import record_evaluation
from ba_lora.experiments.stages import evaluation_stages
from ba_lora.glue import hub_source
from ba_lora.io import read_json, write_json_atomic, write_jsonl_atomic
from eval import nlu
from eval.scoring import grader_versions
from eval.tasks.gsm8k import GSM8K
from tests.support.tiny_nlu import scored_run

OLD = hub_source("a" * 40)


def stages(config, fault):
    return [stage.name for stage in evaluation_stages([config], generate=not fault.regrade)]


@pytest.fixture
def evaluated(tmp_path):
    """A run evaluated on GSM8K by version 1 of its grader: `evaluated(*tasks)` → its config when asked for `tasks`."""

    def config(*tasks):
        words = [f"output_dir={tmp_path}", f"eval.tasks=[{','.join(tasks)}]"]
        return load_config("configs/nlg/toy.yaml", overrides=words)

    write_json_atomic(tmp_path / "train.json", {"status": "ok"})
    write_json_atomic(tmp_path / STATE_FILE, evaluation_state(config("gsm8k")))
    write_json_atomic(tmp_path / "scores" / "gsm8k.json", {"version": "1"})
    write_jsonl_atomic(tmp_path / "completions" / "gsm8k.jsonl", [])
    return config


@pytest.mark.parametrize("tasks", [("gsm8k", "math"), ("math", "gsm8k")])
def test_of_two_faults_the_one_that_asks_for_more_counts(evaluated, tasks):
    """If it were only graded again, MATH would have no completions."""
    config, graders = evaluated(*tasks), {"gsm8k": {"version": "2"}}
    fault = evaluation_fault(config, evaluation_state(config), graders=graders)
    assert fault == Fault("no score of math", stale=False)
    assert stages(config, fault) == ["generate", *(f"score {task}" for task in tasks)]


def test_without_completions_nothing_is_graded_again(evaluated, tmp_path):
    config, graders = evaluated("gsm8k"), {"gsm8k": {"version": "2"}}
    reason = "gsm8k: graded by version 1, the grader is at version 2 now"
    fault = evaluation_fault(config, evaluation_state(config), graders=graders)
    assert fault == Fault(reason, regrade=True) and stages(config, fault) == ["score gsm8k"]
    (tmp_path / "completions" / "gsm8k.jsonl").unlink()
    fault = evaluation_fault(config, evaluation_state(config), graders=graders)
    assert fault == Fault(f"{reason}; no completions of gsm8k") and stages(config, fault) == ["generate", "score gsm8k"]


@pytest.mark.parametrize("text", ["", "{}", '{"eval": {"tas', '{"eval": []}', "[1]"])
def test_a_damaged_state_is_no_state(evaluated, tmp_path, text):
    """It is told, and the next evaluation writes it again."""
    config = evaluated("gsm8k")
    (tmp_path / STATE_FILE).write_text(text)
    assert evaluation_fault(config, evaluation_state(config)) == Fault("evaluation.json cannot be read")
    write_json_atomic(tmp_path / "scores" / "gsm8k.json", {"version": GSM8K().version, "n": 1, "metrics": {}})
    config.results_dir, config.export.merged = str(tmp_path / "results"), False
    record_evaluation(config, evaluation_state(config))
    assert evaluation_fault(config, evaluation_state(config)) is None


def test_a_damaged_score_is_graded_again(evaluated, tmp_path):
    (tmp_path / "scores" / "gsm8k.json").write_text('{"version')
    fault = evaluation_fault(evaluated("gsm8k"), evaluation_state(evaluated("gsm8k")))
    assert fault == Fault("the score of gsm8k cannot be read", regrade=True)


def test_what_changes_no_score_is_no_fault(evaluated, tmp_path):
    """Also where the state was noted with it, as it once was."""
    config = evaluated("gsm8k")
    state = evaluation_state(config)
    older = {**dataclasses.asdict(config.eval), "options": {"serve": "hot"}, "untuned": False}
    assert config.eval.untuned and "untuned" not in state["eval"]
    write_json_atomic(tmp_path / STATE_FILE, state | {"eval": older})
    assert evaluation_fault(config, state) is None
    config.eval.untuned, config.eval.options = False, {"serve": "merged"}
    assert evaluation_fault(config, evaluation_state(config)) is None
    config.eval.options = {"temperature": 1.0}
    assert evaluation_fault(config, evaluation_state(config)).reason == "evaluated with another eval.options"


def fault_of(config):
    return evaluation_fault(config, evaluation_state(config), graders=grader_versions())


def evaluate(config, fault):
    (stage,) = evaluation_stages([config], generate=not fault.regrade)
    return nlu.main(stage.call.words)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "0"}, "rte: graded by version 0, the grader is at version"),
        ({"stale": "its grader changed"}, "rte: its grader changed"),
        (None, "the score of rte cannot be read"),
        ({"data_sha256": {"hub": OLD}}, f"rte: made from {OLD}, pinned is {hub_source()}"),
    ],
)
def test_an_own_dev_set_is_scored_again_from_what_training_predicted(tmp_path, changes, reason):
    """It takes no merged/, and afterwards the score holds."""
    config = scored_run(tmp_path / "run")
    path = tmp_path / "run" / "scores" / "rte.json"
    score = read_json(path)
    assert fault_of(config) is None and score["metrics"] == {"accuracy": 0.5}
    write_json_atomic(path, changes and score | changes)
    fault = fault_of(config)
    assert fault.reason.startswith(reason) and fault.regrade
    evaluate(config, fault)
    assert read_json(path) == score and fault_of(config) is None


def test_a_commit_that_the_config_names_is_no_fault(tmp_path):
    config = scored_run(tmp_path / "run", f"data.revision={'a' * 40}")
    assert read_json(tmp_path / "run" / "scores" / "rte.json")["data_sha256"]["hub"] == OLD
    assert fault_of(config) is None


def test_predictions_on_other_rows_than_the_pinned_are_refused(tmp_path):
    """No scoring fixes them: the message says what does, and nothing is written."""
    config = scored_run(tmp_path / "run", made_from=OLD)
    fault = fault_of(config)
    before = (tmp_path / "run" / "scores" / "rte.json").read_bytes()
    with pytest.raises(UserError, match=f"training predicted rte of {OLD}, pinned is .*overwrite=true"):
        evaluate(config, fault)
    assert (tmp_path / "run" / "scores" / "rte.json").read_bytes() == before


def test_what_must_be_predicted_takes_the_merged_model(tmp_path):
    hans = tmp_path / "hans.jsonl"
    write_jsonl_atomic(hans, [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, 1)])
    config = scored_run(tmp_path / "run", "eval.tasks=[hans]", f"eval.data.hans={hans}")
    fault = fault_of(config)
    assert fault == Fault("not evaluated", stale=False)
    with pytest.raises(UserError, match="run has no merged/ to predict hans with: finish the run, with export.merged"):
        evaluate(config, fault)
