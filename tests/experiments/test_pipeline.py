"""The pipeline's launch line, its stages, and the embedded default as a user runs it."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

from ba_lora.config.layers import load_config
from ba_lora.config.schema import to_yaml
from ba_lora.errors import UserError
from ba_lora.experiments import pipeline, pipeline_nlu, stages
from ba_lora.runs.results_table import labelled, results_table
from eval.check import find_error
from eval.tasks import TASKS
from tests.conftest import ROOT
from tests.support.signals import slow_to_end

NODES = {"NUM_MACHINES": "2", "MACHINE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def after(command, option):
    return command[command.index(option) + 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_stage_end_in_order(tmp_path, monkeypatch, number):
    """It reaches this process only; the stage needs a second to write down that it was cancelled."""
    monkeypatch.setattr(stages, "ENDS_BY_ITSELF_S", 0.1)
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        stages.leave_on_sigterm()
        code, ended = slow_to_end(tmp_path, number)
        with pytest.raises((KeyboardInterrupt, SystemExit)) as left:
            stages.run_stage(stages.Stage("train", stages.Call("-c", settings=(code,), launch=(sys.executable,)), ()))
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert ended.exists()
    assert left.type is KeyboardInterrupt if number == signal.SIGINT else left.value.code == 128 + number


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_one_gpu_or_none_runs_plain_python(num_gpus):
    assert stages.launch_command({}, num_gpus=num_gpus) == [sys.executable]


def test_several_gpus_run_under_accelerate():
    command = stages.launch_command({}, num_gpus=8)
    assert after(command, "--config_file").endswith("configs/accelerate/multi_gpu.yaml")
    assert after(command, "--num_processes") == "8" and "--machine_rank" not in command


def test_the_config_of_accelerate_can_be_chosen():
    command = stages.launch_command({"ACCELERATE_CONFIG": "configs/accelerate/zero3.yaml"}, num_gpus=4)
    assert after(command, "--config_file").endswith("zero3.yaml")
    command = stages.launch_command(
        {"ACCELERATE_CONFIG": "configs/accelerate/cpu.yaml", "NUM_PROCESSES": "2"}, num_gpus=0
    )
    assert after(command, "--num_processes") == "2"


def test_several_machines():
    command = stages.launch_command(NODES, num_gpus=8)
    assert after(command, "--config_file").endswith("configs/accelerate/multi_node.yaml")
    assert after(command, "--num_processes") == "16" and after(command, "--num_machines") == "2"
    assert after(command, "--machine_rank") == "1"
    assert (after(command, "--main_process_ip"), after(command, "--main_process_port")) == ("node0", "29500")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NUM_MACHINES": "2"}, "also needs MACHINE_RANK, MASTER_ADDR, MASTER_PORT"),
        (NODES | {"MACHINE_RANK": "first"}, "MACHINE_RANK=first must be a whole number"),
        ({"ACCELERATE_CONFIG": "no/such.yaml"}, "no such file: .*no/such.yaml"),
    ],
)
def test_bad_launch_settings(environ, message):
    with pytest.raises(UserError, match=message):
        stages.launch_command(environ, num_gpus=2)


@pytest.mark.parametrize("text", ["hello", "[1, 2]", "compute_environment: MARS", "nonsense: 1", "a: [", "", "\x00"])
def test_a_launch_config_that_accelerate_cannot_read(text, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="launch.yaml") as error:
        stages.launch_command({"ACCELERATE_CONFIG": str(path)}, num_gpus=2)
    assert "\n" not in str(error.value)


def test_methods_and_seeds_make_runs_of_their_own():
    specs = pipeline.asked_specs("toy", ["method=lora,ba_lora", "seed=1,2", "data.num_rows=5"])
    assert [(spec.config.method, spec.config.seed) for spec in specs] == [
        ("lora", 1), ("lora", 2), ("ba_lora", 1), ("ba_lora", 2),
    ]  # fmt: skip
    assert specs[0].overrides == ("data.num_rows=5", "seed=1") and len({spec.config.run_id for spec in specs}) == 4
    (alone,) = pipeline.asked_specs("toy", ["method=lora"], method="lora")
    assert (alone.config.method, alone.config.seed) == ("lora", 42)
    specs = pipeline.asked_specs("toy", ["seed=[1,2]"], kind="nlu", default=("lora", "pissa"))
    assert [(s.config.method, s.config.seed) for s in specs] == [("lora", 1), ("lora", 2), ("pissa", 1), ("pissa", 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=pissa"], "method=pissa beside --method lora: give one"),
        (["seed=1,1"], "name each run once"),
        (["seed=1,2", "output_dir=outputs/one"], "leave output_dir out"),
        (["seed=1,two"], "two"),
        (["seed=1,,2"], "a name or several"),
        (["method="], "a name or several"),
        (["seed=1,2", "hub.push=true", "hub.repo_id=a/b"], "hub.push=true pushes one run"),
    ],
)
def test_what_several_runs_cannot_be(words, message):
    with pytest.raises(UserError, match=message):
        pipeline.asked_specs("toy", words, method="lora" if words == ["method=pissa"] else None)


def test_several_runs_are_printed_in_one_table(monkeypatch, capsys, tmp_path):
    """The pre-trained model once, then each run with its seed and its λ."""
    trained = []

    def evaluated(config):
        score = {"n": 4, "invalid": 0, "metrics": {"strict": 0.5}, "generation": None}
        facts = {"method": config.method, "seed": config.seed, "config": dataclasses.asdict(config)}
        return facts | {"training": None, "evaluation": {"toy": score}}

    monkeypatch.setattr(pipeline, "launch_command", lambda environ: [sys.executable])
    monkeypatch.setattr(pipeline, "locked", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(pipeline, "run_stage", lambda stage: trained.append(after(stage.call.command, "--method")))
    monkeypatch.setattr(pipeline, "evaluate_run", evaluated)
    words = ["toy", "method=lora,ba_lora", "seed=1,2", f"results_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["pipeline", *words])
    assert pipeline.main() == 0
    assert trained == ["lora", "lora", "ba_lora", "ba_lora"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[3:-1]] == [
        "untuned",
        "lora seed=1 λ=0/0/0",
        "lora seed=2 λ=0/0/0",
        "ba_lora seed=1 λ=0.0001/0.0003/0.0001",
        "ba_lora seed=2 λ=0.0001/0.0003/0.0001",
    ]
    assert lines[-1].startswith("results: ") and len(lines[-1].split()) == 5


def test_what_is_alike_is_not_named():
    settings = {"regularizers": {f"lambda_{term}": 0.0 for term in ("consistency", "diversity", "svd")}}
    runs = [{"method": method, "seed": 1, "config": settings} for method in ("lora", "pissa")]
    assert [run["method"] for run in labelled(runs)] == ["lora", "pissa"]
    assert [run["method"] for run in labelled([runs[0], runs[0] | {"seed": 2}])] == ["lora seed=1", "lora seed=2"]


def test_words_are_a_config_and_overrides():
    assert pipeline.split_words([]) == (pipeline.DEFAULT_CONFIG, [])
    assert pipeline.split_words(["a=1", "x.yaml", "b=2"]) == ("x.yaml", ["a=1", "b=2"])
    with pytest.raises(UserError, match="one config at a time"):
        pipeline.split_words(["x.yaml", "y.yaml"])


def test_runs_and_tasks_share_one_engine_start():
    overrides = [
        "eval.tasks=[toy,gsm8k,inheritance]",
        "eval.data.inheritance=data/toy/test.jsonl",
        "eval.limit=5",
        "eval.options.temperature=0.5",
    ]
    configs = [load_config("configs/nlg/toy.yaml", overrides=[*overrides, f"seed={seed}"]) for seed in (1, 2)]
    generate, *scores, measure = stages.evaluation_stages(configs)
    command = generate.call.command
    assert command[command.index("--task") + 1 : command.index("--data")] == ["toy", "gsm8k"]
    runs = [str(config.run_path) for config in configs]
    assert command[command.index("--model") + 1 : command.index("--task")] == runs
    assert "limit=5" in command and "temperature=0.5" in command and after(command, "--data").startswith("toy=")
    assert [after(score.call.command, "--task") for score in scores] == ["toy", "gsm8k"] * 2
    assert [score.run_paths for score in scores] == [(config.run_path,) for config in configs for _ in range(2)]
    assert all("allow_partial=true" in score.call.command for score in scores)
    data = [str(ROOT / "data/toy/test.jsonl")] * 2
    assert measure.call.command[1:7] == ["-m", "eval.inheritance", "--run", *runs, "--texts"]
    assert [after(measure.call.command, word) for word in ("--texts", "--data")] == data


def test_the_marks_of_thinking_reach_the_scoring():
    config = load_config("configs/nlg/toy.yaml", overrides=["eval.options.thinking=<reason> </reason>"])
    generate, score = stages.evaluation_stages([config])[:2]
    assert all("thinking=<reason> </reason>" in stage.call.command for stage in (generate, score))


def test_an_evaluation_that_is_stopped_leaves_no_scores_that_hold(tmp_path, monkeypatch):
    """The first one's score of one task and the second one's of the other are no evaluation."""

    def config(*words):
        tasks = [f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path}", "eval.tasks=[toy,heldout]"]
        return load_config("configs/nlg/toy.yaml", overrides=[*tasks, f"eval.data.heldout={rows}", *words])

    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    first, second = config(), config("eval.options.temperature=0.8")
    put = tmp_path / "run" / "scores"
    put.mkdir(parents=True)
    (tmp_path / "run" / "train.json").write_text('{"status": "ok"}')
    states = [pipeline.evaluation_state(one) for one in (first, second)]
    for task in ("toy", "heldout"):
        (put / f"{task}.json").write_text("{}")
    (tmp_path / "run" / pipeline.STATE_FILE).write_text(json.dumps(states[0]))
    assert pipeline.evaluation_fault(first, states[0]) is None

    def interrupted(stage):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.evaluate_run(second)
    assert not any(put.iterdir())
    for task in ("toy", "heldout"):
        (put / f"{task}.json").write_text("{}")
    assert pipeline.evaluation_fault(first, states[0]).stale
    assert pipeline.evaluation_fault(second, states[1]).reason == "no score of toy"


def test_a_score_of_other_completions_does_not_hold(tmp_path):
    """As after eval.generate by hand."""
    config = load_config("configs/nlg/toy.yaml", overrides=[f"output_dir={tmp_path}"])
    (tmp_path / "train.json").write_text('{"status": "ok"}')
    state = pipeline.evaluation_state(config)
    (tmp_path / pipeline.STATE_FILE).write_text(json.dumps(state))
    for folder, name, sha256 in (("scores", "toy.json", "a"), ("completions", "toy.meta.json", "a")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps({"completions_sha256": sha256}))
    assert pipeline.evaluation_fault(config, state) is None
    (tmp_path / "completions" / "toy.meta.json").write_text('{"completions_sha256": "b"}')
    assert pipeline.evaluation_fault(config, state).reason == "toy: scored from other completions"


def test_the_pretrained_model_is_evaluated_by_its_own_name():
    config = pipeline.untuned_config(load_config("configs/nlg/toy.yaml"))
    generate = stages.evaluation_stages([config])[0].call.command
    assert after(generate, "--model").endswith("data/toy/clean")
    assert after(generate, "--output") == str(config.run_path / "completions")


def test_the_pretrained_model_is_recorded_like_a_run_and_once(tmp_path):
    """A second look leaves the file as it is, by whose hash its scores know it."""
    words = [f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path}", "model.revision=main"]
    config = pipeline.untuned_config(load_config("configs/nlg/toy.yaml", overrides=words))
    config = dataclasses.replace(config, output_dir=str(tmp_path / "run"))
    pipeline.prepare_evaluation(config)
    written = (tmp_path / "run" / "train.json").read_bytes()
    result = pipeline.record_result(config)
    assert result["status"] == "ok" and result["training"] is None
    assert result["model"] == {"name": "data/toy/clean", "revision": "main"}
    assert result["environment"]["packages"]["torch"] and result["environment"]["num_processes"] == 1
    assert datetime.datetime.fromisoformat(result["finished_at"]).tzinfo is not None
    pipeline.prepare_evaluation(config)
    assert (tmp_path / "run" / "train.json").read_bytes() == written


def test_a_missing_judge_is_told_before_the_training(tmp_path, monkeypatch, capsys):
    words = ["pipeline", "configs/nlg/toy.yaml", "eval.tasks=[mt_bench]", f"output_dir={tmp_path}", "--dry-run"]
    monkeypatch.setattr(sys, "argv", words)
    for name in ("JUDGE_MODEL", "JUDGE_BASE_URL", "JUDGE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def told():
        pipeline.main()
        return capsys.readouterr().err

    assert (
        told().startswith("warning: JUDGE_MODEL is not set: name the judge")
        and "unless its judgements are on file" in told()
    )
    monkeypatch.setenv("JUDGE_MODEL", "judge")
    assert told().startswith("warning: JUDGE_API_KEY is not set")
    monkeypatch.setenv("JUDGE_API_KEY", "key")
    assert not told()
    monkeypatch.delenv("JUDGE_MODEL")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "mt_bench.json").write_text("{}")  # judged already
    assert not told()
    monkeypatch.setattr(sys, "argv", ["pipeline", "configs/nlg/toy.yaml", "--dry-run"])
    assert not told()


def test_a_missing_data_file_is_told_before_anything_is_loaded():
    config = load_config("configs/nlg/toy.yaml", overrides=["eval.data.toy=/no/such.jsonl"])
    with pytest.raises(UserError, match="eval.data.toy: no such file"):
        stages.evaluation_stages([config])


def test_a_task_without_data_of_its_own_is_told_before_the_training(tmp_path, monkeypatch):
    words = ["pipeline", "configs/nlg/toy.yaml", "eval.tasks=[heldout]", f"output_dir={tmp_path / 'run'}", "--dry-run"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(TASKS["heldout"], "hub", None)
    monkeypatch.setattr(
        stages,
        "ask_module",
        lambda module, commands: {"errors": [find_error(name, words) for name, *words in commands]},
    )
    with pytest.raises(UserError, match="heldout has no data of its own.*eval.data.heldout=FILE"):
        pipeline.main()
    assert not (tmp_path / "run").exists()


def test_an_nlu_run_is_checked_trained_and_pushed_as_any_other(tmp_path, monkeypatch, capsys):
    """Its evaluation is checked before the training, and what is asked to be pushed is pushed, at the end."""
    done = []
    monkeypatch.setattr(pipeline, "check_evaluation", lambda stages: done.append([stage.name for stage in stages]))
    monkeypatch.setattr(pipeline, "train_run", lambda spec: done.append("trained"))
    monkeypatch.setattr(pipeline, "evaluate_run", lambda config: done.append("evaluated"))
    monkeypatch.setattr("ba_lora.runs.export.push_to_hub", lambda path, config: done.append("pushed"))
    monkeypatch.setattr(pipeline_nlu, "run_table", lambda results: "table")
    monkeypatch.setattr(pipeline, "labelled", lambda results: results)
    words = ["minilm", "method=ba_lora", "task=sst2", f"output_dir={tmp_path / 'run'}", "eval.tasks=[yelp]"]
    monkeypatch.setattr(sys, "argv", ["pipeline_nlu", *words, "hub.push=true", "hub.repo_id=u/n"])
    assert pipeline_nlu.main() == 0 and done == [["evaluate"], "trained", "evaluated", "pushed"]
    for rank in ("first", "-1"):
        monkeypatch.setenv("MACHINE_RANK", rank)
        with pytest.raises(UserError, match=f"MACHINE_RANK={rank} must be a whole number"):
            pipeline_nlu.main()
    monkeypatch.setenv("MACHINE_RANK", "")
    assert pipeline_nlu.main() == 0


def test_what_will_be_trained_is_checked_before(tmp_path, monkeypatch):
    """A training that failed has a train.json, too."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.json").write_text('{"status": "error"}')
    asked = []
    monkeypatch.setattr(pipeline, "check_evaluation", lambda stages: asked.append([stage.name for stage in stages]))

    def plan(*words):
        specs = pipeline.asked_specs("toy", [f"output_dir={run}", *words], method="lora")
        pipeline.run_specs(specs, table=str, dry_run=True)

    plan()
    monkeypatch.setattr(pipeline, "is_finished", lambda config: True)
    plan("overwrite=true")
    assert asked == [["generate", "score toy"]] * 2
    plan()
    assert len(asked) == 2


def test_why_scores_no_longer_hold(tmp_path):
    config = load_config("configs/nlg/toy.yaml", overrides=[f"output_dir={tmp_path}", "eval.limit=5"])
    (tmp_path / "train.json").write_text('{"status": "ok"}')
    score = tmp_path / "scores" / "toy.json"

    def fault(**graders):
        found = pipeline.evaluation_fault(config, pipeline.evaluation_state(config), graders=graders)
        return found and found.reason

    assert fault() == "not evaluated"
    state = pipeline.evaluation_state(config)
    (tmp_path / pipeline.STATE_FILE).write_text(json.dumps(state))
    assert fault() == "no score of toy"
    for name in ("scores", "completions"):
        (tmp_path / name).mkdir()
    (tmp_path / "completions" / "toy.jsonl").touch()
    score.write_text('{"version": "1", "data_sha256": {"hub": "a/b@1"}}')
    assert fault() is None and fault(toy={"version": "1", "hub": "a/b@1"}) is None
    assert fault(toy={"version": "2"}) == "toy: graded by version 1, the grader is at version 2 now"
    assert fault(toy={"version": "1", "hub": "a/b@2"}) == "toy: made from a/b@1, pinned is a/b@2"
    score.write_text('{"stale": "graded by version 0"}')
    assert fault() == "toy: graded by version 0"
    state["eval"]["limit"] = 6
    (tmp_path / pipeline.STATE_FILE).write_text(json.dumps(state))
    assert fault() == "evaluated with another eval.limit"
    (tmp_path / "train.json").write_text('{"status": "ok", "again": 1}')
    assert fault() == "evaluated with another training, eval"


def test_tables_with_other_columns_share_a_run(tmp_path):
    """Scores of tasks that only another table asks for are kept, and count there."""
    words = [f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path}", "export.merged=false"]
    first, second, both = (
        load_config("configs/nlg/toy.yaml", overrides=[*words, f"eval.tasks=[{tasks}]"])
        for tasks in ("toy", "gsm8k", "toy,gsm8k")
    )
    (tmp_path / "run" / "scores").mkdir(parents=True)
    (tmp_path / "run" / "train.json").write_text('{"status": "ok"}')
    for config, task in ((first, "toy"), (second, "gsm8k")):
        (tmp_path / "run" / "scores" / f"{task}.json").write_text('{"version": "1", "n": 1, "metrics": {}}')
        state = pipeline.evaluation_state(config)
        assert pipeline.evaluation_fault(config, state) is not None
        pipeline.record_evaluation(config, state)
    for config in (first, second, both):
        assert pipeline.evaluation_fault(config, pipeline.evaluation_state(config)) is None
    shorter = load_config("configs/nlg/toy.yaml", overrides=[*words, "eval.tasks=[toy]", "eval.limit=5"])
    pipeline.record_evaluation(shorter, pipeline.evaluation_state(shorter))
    assert (
        pipeline.evaluation_fault(second, pipeline.evaluation_state(second)).reason
        == "evaluated with another eval.limit"
    )


@pytest.mark.parametrize(
    ("changes", "completions", "kept"),
    [
        ([], "the same", ["gsm8k", "inheritance", "toy"]),
        ([], "others", ["inheritance", "toy"]),
        ([], None, ["inheritance", "toy"]),
        (["eval.limit=5"], "the same", ["toy"]),
    ],
)
def test_a_failed_scoring_takes_away_what_was_scored_in_another_way(tmp_path, changes, completions, kept):
    """An older grader's score of the same completions stays in the result, as does a measure, which has none; none
    holds."""
    words = [f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path}", "export.merged=false"]
    words += ["eval.tasks=[toy,gsm8k,inheritance]", "eval.data.inheritance=README.md"]
    (tmp_path / "run" / "scores").mkdir(parents=True)
    (tmp_path / "run" / "train.json").write_text('{"status": "ok"}')
    score = {"version": "1", "n": 1, "metrics": {}}
    graded = score | {"completions_sha256": hashlib.sha256(b"the same").hexdigest()}
    for task in ("toy", "gsm8k", "inheritance"):
        made = score if task == "inheritance" else graded
        (tmp_path / "run" / "scores" / f"{task}.json").write_text(json.dumps(made))
    if completions is not None:
        (tmp_path / "run" / "completions").mkdir()
        (tmp_path / "run" / "completions" / "gsm8k.jsonl").write_text(completions)
    before = load_config("configs/nlg/toy.yaml", overrides=words)
    pipeline.record_evaluation(before, pipeline.evaluation_state(before))
    config = load_config("configs/nlg/toy.yaml", overrides=[*words, *changes])
    state = pipeline.evaluation_state(config)
    result = pipeline.record_evaluation(config, state, failed=["gsm8k", "inheritance"])
    assert sorted(result["evaluation"]) == kept
    assert pipeline.evaluation_fault(config, state).reason == "no score of gsm8k"


@pytest.mark.slow
def test_a_finished_run_is_printed_without_torch(tmp_path, root, train):
    """Training it has taken minutes; to look at it again takes what reading the files takes."""
    run = train("eval.tasks=[]", method="lora")
    words = [str(tmp_path / "base.yaml"), "--method", "lora", f"output_dir={run}", "eval.tasks=[]"]
    program = (
        "import sys; from ba_lora.experiments import pipeline; sys.argv[0] = 'pipeline'; status = pipeline.main(); "
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)), status)"
    )
    command = [sys.executable, "-c", program, *words]

    def printed():
        done = subprocess.run(
            command, cwd=root, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = printed()
    assert "run is trained already (overwrite=true redoes it)" in told and told.endswith("[] 0\n")
    (result,) = (tmp_path / "results").iterdir()
    assert f"result: {result}" in told
    result.unlink()
    assert f"result: {result}" in printed() and result.is_file()  # by the training's own process
    (run / "adapter" / "adapter_model.safetensors").unlink()
    assert "adapter/ has no weights: it is exported again" in printed()


def test_the_table_of_results():
    score = {"n": 4, "invalid": 1, "metrics": {"strict": 0.5, "flexible": 0.75}, "generation": {"seconds": 3.2}}
    results = [
        {"method": "untuned", "training": None, "evaluation": {"toy": score | {"generation": None}}},
        {"method": "ba_lora", "training": {"seconds": 61.7, "peak_memory_mb": 700.2}, "evaluation": {"toy": score}},
    ]
    lines = results_table(results).splitlines()
    assert lines[0].split() == "method task strict flexible n invalid train s eval s peak MB".split()
    assert lines[3].split() == "ba_lora toy 50.00 75.00 4 1 62 3 700".split()
    assert results_table([]) == "no evaluated run"
    results[1]["evaluation"]["inheritance"] = {"n": 3, "invalid": 0, "metrics": {"distinct_2": 0.5}}
    results[1]["evaluation"]["mt_bench"] = {"n": 2, "invalid": 0, "metrics": {"rating": 0.7}, "ratings": {"overall": 7}}
    lines = results_table(results).splitlines()  # each other metric in a column of its own
    start = {name: lines[0].index(name) for name in ("task", "strict", "distinct_2", "rating", "n  ")}
    assert [line[start["task"] :].split()[0] for line in lines[2:]] == ["toy", "inheritance", "mt_bench", "toy"]
    assert lines[3][start["distinct_2"] :].split()[0] == "50.00" and lines[3][start["strict"] :].split()[0] == "50.00"
    assert lines[4][start["rating"] :].split()[:2] == ["7.00", "2"]


def shell(root, *words, timeout_s=3600):
    return subprocess.run(
        ["sh", *words],
        cwd=root,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},  # its OMP_NUM_THREADS too: threads that wait for busy cores spin
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def test_the_default_lifts_accuracy_and_is_not_redone(root, tmp_path):
    """`sh scripts/ba-lora.sh`: at least 40 % strict, at least 20 points above the untuned base; then printed again."""
    words = ["scripts/ba-lora.sh", f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path / 'results'}"]
    done = shell(root, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    table = [line.split() for line in done.stdout.splitlines() if line.startswith(("untuned", "ba_lora"))]
    (untuned, ours) = (float(row[2]) for row in table)
    assert ours >= 40 and ours - untuned >= 20
    assert " | task " in done.stdout and " | svd " in done.stdout and " | consistency " in done.stdout

    (path,) = (tmp_path / "results").glob("toy-ba_lora-s42-*.json")
    result = json.loads(path.read_text())
    assert result["status"] == "ok" and result["method"] == "ba_lora"
    assert 100 * result["evaluation"]["toy"]["metrics"]["strict"] == pytest.approx(ours, abs=0.01)
    assert result["evaluation"]["toy"]["n"] == 400
    for key in ("config", "model", "data", "prompt_hash", "training", "export", "environment", "finished_at"):
        assert result[key], key
    assert result["environment"]["packages"]["torch"] and "dirty" in result["environment"]["git"]
    assert f"{ours:.2f}" in (tmp_path / "run" / "merged" / "README.md").read_text()
    assert (tmp_path / "run" / "grades" / "toy.jsonl").is_file()

    again = shell(root, *words)
    assert again.returncode == 0 and "is trained already" in again.stdout and "step " not in again.stdout
    assert [line.split() for line in again.stdout.splitlines() if line.startswith(("untuned", "ba_lora"))] == table


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_default_holds_for_other_seeds(root, tmp_path, seed):
    """With the default's own seed these are three."""
    done = shell(
        root, "scripts/ba-lora.sh", f"seed={seed}", f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    untuned, ours = (
        float(line.split()[2]) for line in done.stdout.splitlines() if line.startswith(("untuned", "ba_lora"))
    )
    assert ours >= 40 and ours - untuned >= 20


def test_a_saved_config_keeps_its_method(root, tmp_path, capsys, monkeypatch):
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(load_config("configs/nlg/toy.yaml", method="pissa")))
    for words, method in (([str(saved)], "pissa"), (["seed=2"], "ba_lora")):
        monkeypatch.setattr("sys.argv", ["pipeline", "--dry-run", *words])
        pipeline.main()
        assert f"outputs/toy-{method}-s" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["pipeline", "--dry-run", "--method", "lora", str(saved)])
    with pytest.raises(UserError, match="is the resolved config of method pissa"):
        pipeline.main()
