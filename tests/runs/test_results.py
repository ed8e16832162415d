"""A result is assembled from what its run's folder says, and says nothing that only holds now."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ba_lora import prompts
from ba_lora.config.layers import load_config
from ba_lora.experiments.tables import find_table, load_table
from ba_lora.io import read_json, write_json_atomic
from ba_lora.paths import PROJECT_ROOT
from ba_lora.prompts import prompt_hash
from ba_lora.runs import folder as run
from ba_lora.runs.environment import code_state, environment, git_state, hardware_name
from ba_lora.runs.results import assemble, write_result
from tests.support.committed import committed_paths, committed_text


@pytest.fixture
def config(tmp_path):
    return load_config("configs/nlg/toy.yaml", overrides=[f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path}"])


def test_a_run_that_was_not_trained_has_failed(config):
    result = assemble(config.run_path, config)
    assert (result["status"], result["error"], result["evaluation"]) == ("failed", "not trained", {})


def test_the_prompt_is_the_one_of_the_training(config, monkeypatch):
    """Scored again under another template, the result still says what was trained on."""
    trained_with = prompt_hash()
    run.finish_run(config.run_path, config, {"training": {"steps": 3}})
    monkeypatch.setitem(prompts.TEMPLATES, "alpaca", "Another one: {instruction}")
    result = write_result(config.run_path, config)
    assert (result["prompt_hash"], result["training"], result["status"]) == (trained_with, {"steps": 3}, "ok")
    assert result == read_json(config.result_path)


def test_how_the_completions_were_made_stands_beside_the_scores(config):
    run_path = config.run_path
    for task in ("toy", "other"):
        write_json_atomic(run_path / "scores" / f"{task}.json", {"task": task, "metrics": {}, "n": 0})
    measure = {"generation": {"engine": "hf"}, "metrics": {}, "n": 0}
    write_json_atomic(run_path / "scores" / "inheritance.json", measure)
    write_json_atomic(run_path / "completions" / "toy.meta.json", {"engine": "vllm"})
    found = {task: score["generation"] for task, score in assemble(run_path, config)["evaluation"].items()}
    assert found == {"toy": {"engine": "vllm"}, "other": None, "inheritance": {"engine": "hf"}}
    assert "output_dir" not in json.dumps(assemble(run_path, config)["config"])


def test_the_recorded_command_tells_no_folder_of_the_machine(monkeypatch):
    words = ["--config", str(PROJECT_ROOT / "configs" / "nlg" / "toy.yaml"), "data.source=/home/someone/rows.jsonl"]
    words += [
        "data.source=[/home/someone/a.jsonl,../b.jsonl]",
        "eval.data={harness/bbq: /home/someone/bbq.jsonl, qa: c}",
    ]
    monkeypatch.setattr("sys.argv", ["/home/someone/train_nlg.py", *words, "seed=1"])
    assert environment()["command"] == (
        "train_nlg.py --config configs/nlg/toy.yaml data.source=rows.jsonl data.source=[a.jsonl,b.jsonl] "
        "eval.data={harness/bbq: bbq.jsonl, qa: c} seed=1"
    )


def test_what_a_run_writes_does_not_make_the_code_dirty(tmp_path, monkeypatch):
    """scripts/bench.py appends to results/bench.csv, which is tracked: its next rows are of the same code."""

    def git(*words):
        identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr("ba_lora.runs.environment.PROJECT_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("results/bench.csv", "results/toy/runs/one.json", "scripts/results.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    assert git_state() == {"commit": None, "dirty": None}
    git("init")
    git("add", "--all")
    git("commit", "--message", "all")
    clean = git_state()
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"]) and clean["dirty"] is False
    (tmp_path / "results" / "bench.csv").write_text("and a row")
    (tmp_path / "results" / "toy" / "runs" / "one.json").unlink()
    (tmp_path / "untracked").write_text("")
    assert git_state() == clean
    (tmp_path / "scripts" / "results.py").write_text("after")
    assert git_state() == clean | {"dirty": True}
    code_state.cache_clear()
    try:
        assert code_state() == clean | {"dirty": True}
        git("checkout", "scripts")
        assert git_state() == clean and code_state() == clean | {"dirty": True}  # of what this process has loaded
    finally:
        code_state.cache_clear()


def test_committed_results_come_from_real_runs():
    """Results made up for a test carry short hashes; none may stand where tables look for real ones."""

    def hashes(node):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if isinstance(value, str) and str(key).endswith("sha256"):
                yield value
            yield from hashes(value)

    paths = [path for path in committed_paths("results") if re.search("/runs/[^/]+[.]json$", path)]
    assert paths
    for path in paths:
        result = json.loads(committed_text(path))
        found = list(hashes(result))
        config = result["config"]
        is_generated = "nlu" in config and config["nlu"]["task"] == "toy_pairs" and config["data"]["source"] is None
        assert found or is_generated, path
        assert all(re.fullmatch("[0-9a-f]{64}", value) for value in found), path


def test_committed_toy_results_are_runs_of_the_toy_table(root):
    """A table whose recipe has changed has other run ids: results under the old ones are shown by no table."""
    tracked = committed_paths("results/toy/runs")
    assert tracked
    planned = {root / spec.config.result_path for spec in load_table(find_table("toy")).specs()}
    assert sorted({root / path for path in tracked} - planned) == []


def test_a_cpu_is_named_where_the_result_names_it():
    assert hardware_name({"num_threads": 2, "hardware": {"cpu": "x86_64"}}) == "2 CPU thread(s)"
    assert hardware_name({"num_threads": 2, "cpu_model": "Some CPU"}) == "2 CPU thread(s) of Some CPU"
    on_gpu = {"num_processes": 2, "hardware": {"gpu": "NVIDIA A40"}, "cpu_model": "Some CPU"}
    assert hardware_name(on_gpu) == "2 × NVIDIA A40"


@pytest.mark.skipif(sys.platform != "linux", reason="the name is read from /proc")
def test_the_cpu_is_recorded():
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert environment()["cpu_model"] == (names[0].strip() if names else None)
