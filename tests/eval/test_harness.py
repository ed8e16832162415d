"""eval/harness.py: words, scores in the run's folder and result, what is refused; the harness itself on real data."""

import json
from types import SimpleNamespace

import pytest

from ba_lora.chat import text_hash
from ba_lora.config.layers import load_config, load_run
from ba_lora.errors import UserError
from ba_lora.experiments.stages import evaluation_stages
from ba_lora.io import read_json
from ba_lora.paths import PROJECT_ROOT
from eval import harness
from eval.engines.serving import ServedModel
from eval.lm_eval.driver import group_refusal, leaves
from eval.metric_paths import check as check_metric
from tests.support.page_world import write_run

FOUND = {
    "version": "0.4.13",
    "tasks": {
        "bbq": {
            "results": {"acc,none": 0.25, "acc_stderr,none": 0.1, "exact_match,strict-match": 0.5, "alias": 1},
            "version": 1.0,
            "shots": 0,
            "n": 6,
        }
    },
}


@pytest.fixture
def driver(monkeypatch):
    """Stand in for the harness's process; what it was asked."""
    asked = []
    monkeypatch.setattr(harness, "call_driver", lambda request: asked.append(dict(request)) or FOUND)
    return asked


def test_scores_go_into_the_run_and_its_result(train, driver, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ba_lora.config.schema.RESULTS_PATH", tmp_path / "results")  # where the run's result is
    run = train(method="lora")
    rows = tmp_path / "bbq.jsonl"
    rows.write_text('{"context": "?"}\n')
    harness.main([str(run), "harness/bbq", "--data", f"bbq={rows}", "--limit", "6", "--engine", "hf"])
    score = read_json(run / "scores" / "harness" / "bbq.json")
    assert score["metrics"] == {"acc": 0.25, "exact_match_strict_match": 0.5} and score["stderr"] == {"acc": 0.1}
    assert score["interval_95"]["acc"] == pytest.approx([0.054, 0.446])
    assert (score["n"], score["shots"], score["limit"], score["version"]) == (6, 0, 6, "1.0") and score["data_sha256"]
    result = read_json(load_run(run).result_path)
    assert result["evaluation"]["harness/bbq"]["metrics"]["acc"] == 0.25
    assert not driver[0]["chat"] and "chat_template" not in score
    assert driver[0]["model_args"]["pretrained"] == str(run / "merged") and driver[0]["model"] == "hf"
    assert "harness/bbq" in capsys.readouterr().out


def test_a_run_trained_in_a_chat_template_is_asked_in_it(driver, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", "data.template=chat", method="lora")
    (run / "adapter").mkdir()
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    served = ServedModel("run", "base", "adapter", adapter=run / "adapter", run=run)
    monkeypatch.setattr(harness, "plan_serving", lambda models, revision: [served])
    harness.main([str(run), "bbq", "--engine", "hf", "--output", str(tmp_path)])
    assert driver[0]["chat"] and driver[0]["model_args"]["tokenizer"] == str(run / "adapter")
    assert read_json(tmp_path / "harness" / "bbq.json")["chat_template"] == text_hash("{{ messages }}")


def test_what_is_wrong_is_told_before_the_harness_is_asked(driver, tmp_path, tiny_model):
    for words, message in (
        ([], "a model and at least one task are needed"),
        (["x", "bbq", "--data", "mmlu=f"], "--data mmlu=f: mmlu is unknown: give NAME=FILE, NAME being bbq"),
        (["x", "bbq", "--include-path", str(tmp_path / "no")], "no such folder"),
        (["x", "bbq", "--limit", "0"], "--limit 0: a number of at least 1"),
        (["x", "bbq", "--shots", "-1"], "--shots -1: a number of at least 0"),
        ([str(tiny_model), "bbq", "--engine", "hf"], "is no run folder: say with --output DIR"),
    ):
        with pytest.raises(UserError, match=message):
            harness.main(words)
    assert driver == []
    with pytest.raises(UserError, match="no such file"):
        harness.check(["x", "bbq", "--data", f"bbq={tmp_path}/gone.jsonl"])


def test_a_group_of_groups_has_the_tasks_of_all():
    members = {"mmlu": ["stem", "law"], "stem": ["algebra", "physics"], "algebra": []}
    assert leaves("mmlu", members) == {"algebra", "physics", "law"} and leaves("bbq", members) == {"bbq"}


def test_a_name_of_several_tasks_takes_no_file():
    """Of a group, of a group in it and one that its file defines, and of a tag; a task takes one."""

    def entry(kind, *listed, tags=()):
        return SimpleNamespace(kind=SimpleNamespace(name=kind), cfg={"task": [*listed]}, tags={*tags})

    index = {name: entry("TASK") for name in ("law", "algebra", "physics", "arc_easy")}
    index |= {"stem": entry("GROUP", "algebra", {"task": "physics", "num_fewshot": 2})}
    index |= {"mmlu": entry("GROUP", {"group": "stem", "weight": 1}, "law"), "arc": entry("TAG", tags=["arc_easy"])}
    refused = group_refusal("mmlu", index)
    assert refused.startswith("it names a group of 3 (algebra, law, physics), and a file has the rows of one: ask for")
    assert group_refusal("arc", index).startswith("it names a group of 1 (arc_easy), ")
    assert group_refusal("law", index) is None


def test_without_its_environment_it_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "ENVIRONMENT", tmp_path)
    with pytest.raises(UserError, match="sh scripts/harness.sh --setup"):
        harness.check(["x", "bbq"])


def test_a_run_is_evaluated_by_it_with_the_training():
    config = load_config("toy", overrides=["eval.tasks=[toy,harness/bbq]", "eval.limit=5"])
    (stage,) = [stage for stage in evaluation_stages([config]) if stage.call.module == "eval.harness"]
    assert stage.task == "harness/bbq" and "--limit" in stage.call.words
    asked = harness.read_words(stage.call.words)
    assert asked.tasks == ["bbq"] and asked.model == str(config.run_path)
    check_metric(["nlg", "harness/bbq", "acc"])


@pytest.mark.slow
@pytest.mark.real
def test_the_real_harness_on_real_sets(real_data, tmp_path):
    """CrowS-Pairs, BBQ, MGSM and GSM8K, offline, on a real tiny model; then a task that does not exist."""
    if not (harness.ENVIRONMENT / "bin" / "python").is_file():
        pytest.skip("no .cache/lm-eval: sh scripts/harness.sh --setup")
    files = {
        "crows_pairs_english": "bias/crows_pairs.csv",
        "bbq": "bias/bbq_Religion.jsonl",
        "mgsm_direct_es": "mgsm/mgsm_es.tsv",
        "gsm8k_alpaca": "gsm8k/test.jsonl",
    }
    data = [f"{task}={real_data / file}" for task, file in files.items()]
    model = str(PROJECT_ROOT / "data" / "toy" / "clean")  # GSM8K's 1024 new tokens need its 2048 positions
    words = [model, *files, "--data", *data, "--limit", "8", "--output", str(tmp_path), "--engine", "hf"]
    harness.main(words)
    scores = {task: json.loads((tmp_path / "harness" / f"{task}.json").read_text()) for task in files}
    assert all(score["n"] == 8 for score in scores.values())
    assert 0 <= scores["crows_pairs_english"]["metrics"]["pct_stereotype"] <= 1
    assert {"acc", "amb_bias_score", "disamb_bias_score"} <= set(scores["bbq"]["metrics"])
    assert scores["gsm8k_alpaca"]["metrics"]["exact_match_flexible_extract"] == 0
    file = f"gsm8k={real_data / files['gsm8k_alpaca']}"
    for shots, number in (([], 5), (["--shots", "2"], 2)):
        with pytest.raises(UserError, match=f"shows {number} examples, which would be rows of the file .* --shots 0"):
            harness.check(["x", "gsm8k", "--data", file, *shots])
    harness.check(["x", "gsm8k", "--data", file, "--shots", "0"])
    with pytest.raises(UserError, match="--data mmlu: it names a group of 57 .mmlu_abstract_algebra, .*ask for such a"):
        harness.check(["x", "mmlu", "--data", file.replace("gsm8k=", "mmlu=", 1)])
    with pytest.raises(UserError, match="has no task mgsm_direct_xx .nearest: mgsm_direct"):
        harness.check(["x", "mgsm_direct_xx"])


def test_vllm_is_told_a_rank_that_it_takes(tmp_path):
    """The next of its values above the largest rank of a layer."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "rank_pattern": {"q_proj": 20}}))
    told = harness.model_arguments(ServedModel("x", "base", "adapter", adapter=tmp_path), "vllm")
    assert told["max_lora_rank"] == 32 and told["enable_lora"] is True
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1024}))
    with pytest.raises(UserError, match="vLLM serves LoRA ranks up to 512, not 1024"):
        harness.model_arguments(ServedModel("x", "base", "adapter", adapter=tmp_path), "vllm")
