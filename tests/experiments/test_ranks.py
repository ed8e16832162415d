"""A run that is exported for several ranks (DyLoRA) is evaluated at each of them, and its result tells it."""

import json
import os
import subprocess
import sys

import pytest

from ba_lora.config.layers import load_config
from ba_lora.config.schema import to_yaml
from ba_lora.experiments.evaluation_state import STATE_FILE, evaluation_fault, evaluation_state
from ba_lora.experiments.pipeline import record_evaluation
from ba_lora.experiments.spec import untuned_config
from ba_lora.experiments.stages import evaluation_stages
from ba_lora.runs import results
from ba_lora.runs.folder import EXPORTS, finish_run, is_trained
from eval.engines.serving import plan_serving
from eval.generate import completion_folders, trained_template
from eval.page.items import read_answers
from tests.conftest import ROOT
from tests.support.tiny import only_result


@pytest.fixture
def config(tmp_path):
    """Of a run that is there, trained and scored, at its full rank only."""
    words = ["export.ranks=[1,4]", f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path}", "export.merged=false"]
    config = load_config("toy", method="dylora", overrides=words)
    put(config.run_path / "train.json", {"status": "ok"})
    put(config.run_path / "scores" / "toy.json", SCORE)
    (config.run_path / "config.yaml").write_text(to_yaml(config))
    put(config.run_path / STATE_FILE, evaluation_state(config))
    return config


SCORE = {"task": "toy", "version": "1", "metrics": {"strict": 0.5}, "n": 4}


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_the_stages_are_those_of_each_rank(config):
    generate, *scores = evaluation_stages([config])
    run = config.run_path
    assert generate.call.options["model"] == [str(run), str(run / "ranks" / "1"), str(run / "ranks" / "4")]
    assert [stage.task for stage in scores] == ["toy", "ranks/1/toy", "ranks/4/toy"]
    assert scores[1].call.options["completions"] == str(run / "ranks" / "1" / "completions" / "toy.jsonl")
    assert [stage.task for stage in evaluation_stages([untuned_config(config)])[1:]] == ["toy"]


def test_a_rank_without_a_score_is_yet_to_be_evaluated(config):
    state, ranks = evaluation_state(config), config.run_path / "ranks"
    assert evaluation_fault(config, state).reason == "no score of ranks/1/toy"
    for rank in (1, 4):
        put(ranks / str(rank) / "scores" / "toy.json", SCORE)
    assert evaluation_fault(config, state) is None
    newer = {"toy": {"version": "2"}}
    assert not evaluation_fault(config, state, graders=newer).regrade  # no completions are left
    for folder in (config.run_path, ranks / "1", ranks / "4"):
        put(folder / "completions" / "toy.jsonl", {"task_id": folder.name, "completion": "2"})
    shown = read_answers(config.run_path, "ranks/4/toy", SCORE)
    assert (shown.task, shown.rows[0]["id"], shown.missing) == ("ranks/4/toy", "4", ["no grades at hand"])
    assert evaluation_fault(config, state, graders=newer).regrade
    found = results.evaluation(config.run_path)
    assert list(found) == ["ranks/1/toy", "ranks/4/toy", "toy"] and found["ranks/4/toy"]["metrics"] == {"strict": 0.5}
    record_evaluation(config, state | {"training": "another"}, failed=["ranks/4/toy"])
    assert not (ranks / "4" / "scores" / "toy.json").exists() and (ranks / "1" / "scores" / "toy.json").is_file()


def test_a_rank_keeps_its_own_completions(config, tmp_path):
    adapter = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": "some/base"}
    for folder in (config.run_path / "ranks" / "1", tmp_path / "other"):
        put(folder / "adapter_config.json", adapter)
    of_rank, other = plan_serving([str(config.run_path / "ranks" / "1"), str(tmp_path / "other")])
    assert completion_folders([of_rank], None) == [config.run_path / "ranks" / "1" / "completions"]
    assert (of_rank.trained_in, of_rank.run) == (config.run_path, None) and other.keeps is None
    assert trained_template([of_rank]) is None


def test_ranks_that_are_asked_for_later_are_not_there_yet(config):
    for name in EXPORTS[:1]:
        (config.run_path / name).mkdir()
        (config.run_path / name / "adapter_model.safetensors").write_bytes(b"")
    assert not is_trained(config.run_path, config)
    for rank in (1, 4):
        put(config.run_path / "ranks" / str(rank) / "adapter_model.safetensors", "")
    assert is_trained(config.run_path, config)
    finish_run(config.run_path, config, {})
    assert is_trained(config.run_path, config)
    put(config.run_path / "ranks" / "4" / "adapter_model.safetensors", "of another size")
    assert not is_trained(config.run_path, config)


@pytest.mark.slow
def test_a_dylora_run_is_scored_at_each_rank(tmp_path):
    words = ["method=dylora", "export.ranks=[1,4]", "trainer.max_steps=4", "data.num_rows=64", "eval.limit=8"]
    words += ["eval.untuned=false", "eval.engine=hf", f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path}"]
    command = [sys.executable, "-m", "ba_lora.experiments.pipeline", "configs/nlg/toy.yaml", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = only_result(tmp_path)["evaluation"]
    assert set(found) == {"toy", "ranks/1/toy", "ranks/4/toy"} and all(score["n"] == 8 for score in found.values())
    served = {name: score["generation"]["served"] for name, score in found.items()}
    assert served == {"toy": "merged", "ranks/1/toy": "adapter", "ranks/4/toy": "adapter"}
    again = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert again.returncode == 0 and "is trained already" in again.stdout and "tokens in" not in again.stdout
