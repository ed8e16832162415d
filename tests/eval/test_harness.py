"""eval/harness.py: words, scores in the run's folder and result, what is refused; the harness itself on real data."""

import contextlib
import dataclasses
import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ba_lora.chat import text_hash
from ba_lora.config.layers import load_config, load_run
from ba_lora.errors import UserError
from ba_lora.experiments.evaluation_state import STATE_FILE, Fault, evaluation_fault, evaluation_state
from ba_lora.experiments.spec import untuned_config
from ba_lora.experiments.stages import evaluation_stages
from ba_lora.io import read_json, sha256_file, write_json_atomic
from ba_lora.paths import PROJECT_ROOT
from eval import harness
from eval.engines.serving import ServedModel
from eval.lm_eval.driver import group_refusal, leaves, row_counts
from eval.metric_paths import check as check_metric
from tests.support.page_world import write_run

FOUND = {
    "version": "0.4.13",
    "engine_version": "5.19.0",
    "tasks": {
        "bbq": {
            "results": {"acc,none": 0.25, "acc_stderr,none": 0.1, "exact_match,strict-match": 0.5, "alias": 1},
            "version": 1.0,
            "shots": 0,
            "n": 6,
            "num_missing": 9,
        }
    },
}

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


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
    assert (score["n"], score["shots"], score["version"]) == (6, 0, "1.0") and score["data_sha256"]
    assert score["partial"] and score["num_missing"] == 9
    assert score["generation"] == {
        "harness": "0.4.13",
        "engine": "hf",
        "engine_version": "5.19.0",
        "dtype": "float32",
        "template": None,
        "limit": 6,
        "shots": None,
    }
    result = read_json(load_run(run).result_path)
    assert result["evaluation"]["harness/bbq"]["metrics"]["acc"] == 0.25
    assert not driver[0]["chat"] and "tokenizer" not in driver[0]["model_args"]
    assert driver[0]["model_args"]["pretrained"] == str(run / "merged") and driver[0]["model"] == "hf"
    assert driver[0]["model_args"]["dtype"] == "float32"
    assert "harness/bbq" in capsys.readouterr().out


def test_a_run_and_its_base_are_asked_in_the_template_of_the_training(driver, tmp_path, tiny_model, monkeypatch):
    """The base, which keeps no template of a training, by the words that the pipeline calls the harness with."""
    template = tmp_path / "ours.jinja"
    template.write_text(TEMPLATE)
    words = [f"data.template={template}", "eval.tasks=[harness/bbq]", f"model.name={tiny_model}", "model.revision=null"]
    run = write_run(tmp_path / "run", *words, method="lora")
    (run / "adapter").mkdir()
    (run / "adapter" / "chat_template.jinja").write_text(TEMPLATE)
    served = ServedModel("run", str(tiny_model), "adapter", adapter=run / "adapter", run=run)
    with monkeypatch.context() as patch:
        patch.setattr(harness, "plan_serving", lambda models, revision: [served])
        harness.main([str(run), "bbq", "--engine", "hf", "--output", str(tmp_path)])
    assert driver[0]["chat"] and driver[0]["model_args"]["tokenizer"] == str(run / "adapter")
    tuned = read_json(tmp_path / "harness" / "bbq.json")["generation"]
    assert tuned["template"] == text_hash(TEMPLATE)

    untuned = dataclasses.replace(untuned_config(load_run(run)), output_dir=str(tmp_path / "untuned"))
    (stage,) = evaluation_stages([untuned])
    asked = []

    def ask(request):
        folder = Path(request["model_args"]["tokenizer"])
        asked.append((request["chat"], (folder / "chat_template.jinja").read_text(), request["model_args"]))
        return FOUND

    monkeypatch.setattr(harness, "call_driver", ask)
    harness.main([*stage.call.words, "--engine", "hf"])
    ((chat, text, arguments),) = asked
    assert chat and text == TEMPLATE and arguments["pretrained"] == str(tiny_model)
    assert read_json(tmp_path / "untuned" / "scores" / "harness" / "bbq.json")["generation"] == tuned


def test_a_base_in_4_bit_is_asked_in_the_template_too():
    """Its folder has the tokenizer's own template, not the file's."""
    words = ["data.template=chat", "eval.tasks=[toy,harness/bbq]", "eval.options.dtype=bfloat16"]
    config = untuned_config(load_config("toy", method="lora", overrides=[*words, "model.quantization=nf4"]))
    generate, *_, stage = evaluation_stages([config])
    assert "template=chat" in generate.call.words
    asked = harness.read_words(stage.call.words)
    assert (asked.model, asked.output) == (str(config.run_path), config.run_path / "scores")
    assert (asked.template, asked.dtype) == ("chat", "bfloat16")
    tuned = load_config("toy", method="lora", overrides=words)
    *_, stage = evaluation_stages([tuned])
    assert "--template" not in stage.call.words and "--output" not in stage.call.words


def test_a_score_that_was_made_by_hand_is_made_again(tmp_path):
    """Of fewer rows, of others; the completions beside it hold."""
    rows = tmp_path / "bbq.jsonl"
    rows.write_text('{"context": "?"}\n')
    words = [f"output_dir={tmp_path}", "eval.tasks=[harness/bbq]", "eval.limit=6", f"eval.data={{harness/bbq: {rows}}}"]
    config = load_config("toy", overrides=words)
    write_json_atomic(tmp_path / "train.json", {"status": "ok"})
    state = evaluation_state(config)
    write_json_atomic(tmp_path / STATE_FILE, state)
    made = {"limit": 6, "shots": None, "dtype": "float32", "engine": "hf"}
    score = {"version": "1.0", "generation": made, "data_sha256": sha256_file(rows)}
    for changes, reason in (
        ({}, None),
        ({"generation": made | {"engine": "vllm"}}, None),  # which auto may choose
        ({"generation": made | {"limit": 5}}, "harness/bbq: made with limit 5, asked is 6"),
        ({"generation": made | {"limit": None}}, "harness/bbq: made with limit None, asked is 6"),
        ({"generation": made | {"shots": 0}}, "harness/bbq: made with shots 0, asked is None"),
        ({"generation": made | {"dtype": "float16"}}, "harness/bbq: made with dtype float16, asked is float32"),
        ({"generation": None}, "harness/bbq: it does not tell its limit, asked is 6"),
        ({"data_sha256": None}, "harness/bbq: made from other rows than eval.data names"),
    ):
        write_json_atomic(tmp_path / "scores" / "harness" / "bbq.json", score | changes)
        fault = evaluation_fault(config, state)
        assert fault == (reason and Fault(reason, regrade=True))
    assert [stage.name for stage in evaluation_stages([config], generate=False)] == ["harness/bbq"]


def test_what_is_wrong_is_told_before_the_harness_is_asked(driver, tmp_path, tiny_model):
    for words, message in (
        ([], "a model and at least one task are needed"),
        (["x", "bbq", "--data", "mmlu=f"], "--data mmlu=f: mmlu is unknown: give NAME=FILE, NAME being bbq"),
        (["x", "bbq", "--include-path", str(tmp_path / "no")], "no such folder"),
        (["x", "bbq", "--limit", "0"], "--limit 0: a number of at least 1"),
        (["x", "bbq", "--shots", "-1"], "--shots -1: a number of at least 0"),
        (["x", "bbq", "--dtype", "int8"], "unknown dtype 'int8': choose one of auto"),
        (["x", "bbq", "--template", "alpaca"], "--template alpaca is unknown: chat or a Jinja file"),
        (["x", "bbq", "--template", str(tmp_path / "no.jinja")], "no.jinja"),
        (["x", "bbq", "--template", "chat"], "--template chat needs --output DIR"),
        ([str(tiny_model), "bbq", "--template", "chat", "--output", str(tmp_path)], "has no chat template"),
        ([str(tiny_model), "bbq", "--engine", "hf"], "is no run folder: say with --output DIR"),
    ):
        with pytest.raises(UserError, match=message):
            harness.main(words)
    assert driver == []
    with pytest.raises(UserError, match="no such file"):
        harness.check(["x", "bbq", "--data", f"bbq={tmp_path}/gone.jsonl"])
    for model in ("x", "y"):  # two models of a table
        harness.check([model, "of_two_models", "--engine", "hf"])
    assert [request["tasks"] for request in driver] == [("of_two_models",)]


def test_a_group_of_groups_has_the_tasks_of_all():
    members = {"mmlu": ["stem", "law"], "stem": ["algebra", "physics"], "algebra": []}
    assert leaves("mmlu", members) == {"algebra", "physics", "law"} and leaves("bbq", members) == {"bbq"}
    samples = {name: {"original": 9, "effective": 4} for name in ("algebra", "physics", "law", "bbq")}
    assert row_counts(leaves("mmlu", members), samples) == {"n": 12, "num_missing": 15}


def test_a_name_of_several_tasks_takes_no_file():
    """Of a group, of a group in it and one that its file defines, and of a tag; a task takes one."""

    def entry(kind, *listed, tags=()):
        return SimpleNamespace(kind=SimpleNamespace(name=kind), cfg={"task": [*listed]}, tags={*tags})

    index = {name: entry("TASK") for name in ("law", "algebra", "physics", "arc_easy")}
    index |= {"stem": entry("GROUP", "algebra", {"task": "physics", "num_fewshot": 2}, {"dataset_path": "x"})}
    index |= {"mmlu": entry("GROUP", {"group": "stem", "weight": 1}, "law"), "arc": entry("TAG", tags=["arc_easy"])}
    refused = group_refusal("mmlu", index)
    assert refused.startswith(
        "it names 3 of the harness's tasks (algebra, law, physics), and a file has the rows of one: ask for"
    )
    assert group_refusal("arc", index).startswith("it names 1 of the harness's tasks (arc_easy), ")
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
    assert asked.tasks == ["bbq"] and asked.model == str(config.run_path) and asked.shots is None
    check_metric(["nlg", "harness/bbq", "acc"])


def test_a_config_says_how_the_harness_asks(tmp_path):
    """Number of examples for each task or for all, folders of task files, batch; what keeps its default leaves the
    notes of scores and the pre-trained model's folder as they were without the keys."""

    def config(*words):
        tasks = "eval.tasks=[toy,harness/gsm8k,harness/mmlu]"
        return load_config("toy", method="lora", overrides=[tasks, f"output_dir={tmp_path}", *words])

    def asked(*words):
        stages = [stage for stage in evaluation_stages([config(*words)]) if stage.call.module == "eval.harness"]
        return [harness.read_words(stage.call.words) for stage in stages]

    write_json_atomic(tmp_path / "train.json", {"status": "ok"})
    gsm8k, mmlu = asked("eval.harness.shots={harness/gsm8k: 0}", f"eval.harness.include_path=['{tmp_path}']")
    assert (gsm8k.shots, mmlu.shots, mmlu.folders[1:]) == (0, None, [str(tmp_path)])
    assert [(one.shots, one.batch_size) for one in asked("eval.harness={shots: 3, batch_size: 2}")] == [(3, 2)] * 2

    def named(*words):
        made = config(*words)
        return untuned_config(made).run_path, evaluation_state(made)["eval"]

    plain = named()
    assert "harness" not in plain[1] and named("eval.harness.batch_size=2") == plain
    few = named("eval.harness.shots=3")
    assert few[0] != plain[0] and few[1]["harness"] == {"shots": 3}

    for words, message in (
        (
            ["eval.harness.shots={gsm8k: 0}"],
            "eval.harness.shots.gsm8k: name the task as eval.tasks does, harness/gsm8k",
        ),
        (
            ["eval.harness.shots={harness/gsm: 0}"],
            "eval.harness.shots: harness/gsm is not in eval.tasks .nearest: harn",
        ),
        (["eval.harness.shots=two"], "eval.harness.shots=two: a whole number is needed, or {harness/TASK: NUMBER}"),
        (["eval.harness.shots=-1"], "eval.harness.shots is -1: it must be a number of at least 0"),
        (["eval.harness.batch_size=0"], "eval.harness.batch_size is 0"),
        (["eval.harness.include_path=[no_such]"], "eval.harness.include_path: no such folder: .*no_such"),
    ):
        with pytest.raises(UserError, match=message):
            asked(*words)
    with pytest.raises(UserError, match="eval.harness has no effect on a run of NLU: lm-evaluation-harness asks lang"):
        load_config("toy", kind="nlu", overrides=["eval.harness.shots=0"])


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
    assert all(score["partial"] and score["generation"]["limit"] == 8 for score in scores.values())
    assert scores["bbq"]["num_missing"] == len((real_data / files["bbq"]).read_text().splitlines()) - 8
    assert scores["bbq"]["generation"]["engine_version"] == importlib.metadata.version("transformers")
    (tmp_path / "ours.jinja").write_text(TEMPLATE)
    asked = [model, "crows_pairs_english", "--data", data[0], "--limit", "8", "--engine", "hf"]
    harness.main([*asked, "--template", str(tmp_path / "ours.jinja"), "--output", str(tmp_path / "chat")])
    chat = read_json(tmp_path / "chat" / "harness" / "crows_pairs_english.json")
    assert chat["generation"]["template"] == text_hash(TEMPLATE)
    assert chat["metrics"]["likelihood_diff"] != scores["crows_pairs_english"]["metrics"]["likelihood_diff"]
    assert 0 <= scores["crows_pairs_english"]["metrics"]["pct_stereotype"] <= 1
    assert {"acc", "amb_bias_score", "disamb_bias_score"} <= set(scores["bbq"]["metrics"])
    assert scores["gsm8k_alpaca"]["metrics"]["exact_match_flexible_extract"] == 0
    file = f"gsm8k={real_data / files['gsm8k_alpaca']}"
    for shots, number in (([], 5), (["--shots", "2"], 2)):
        with pytest.raises(UserError, match=f"shows {number} examples, which would be rows of the file .* --shots 0"):
            harness.check(["x", "gsm8k", "--data", file, *shots])
    words = ["eval.tasks=[harness/gsm8k]", f"eval.data.harness/gsm8k={file.partition('=')[2]}"]
    for shots, check in ([], pytest.raises(UserError, match="eval.harness.shots={harness/gsm8k: 0}")), ([0], None):
        config = load_config("toy", overrides=[*words, *(f"eval.harness.shots={number}" for number in shots)])
        (stage,) = evaluation_stages([config])
        with check or contextlib.nullcontext():
            harness.check(stage.call.words)
    with pytest.raises(
        UserError, match="--data mmlu: it names 57 of the harness.s tasks .mmlu_abstract_algebra, .*ask for such a"
    ):
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
