"""Tracked runs, read back from what TensorBoard and Trackio wrote: one run, over a kill, with its scores."""

import json
import sys
import types
from pathlib import Path

import pytest

from ba_lora.config.layers import load_config
from ba_lora.runs.results import refresh_result
from ba_lora.runs.tracking import _open_wandb, _tensorboard_folder
from ba_lora.training.trainer import BALoRATrainer
from tests.config.test_config_values import refused
from tests.support.tiny import only_result

TERMS = ("consistency", "diversity", "svd")


def read_tensorboard(folder, run):
    """Return the names of the tracked runs below the folder, [(step, {name: value})] and the config as text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    names = list(EventMultiplexer().AddRunsFromDirectory(str(folder)).Runs())
    events = EventAccumulator(str(run)).Reload()
    found = [(e.step, {name: e.value}) for name in events.Tags()["scalars"] for e in events.Scalars(name)]
    (config,) = {e.tensor_proto.string_val[0].decode() for e in events.Tensors("config/text_summary")}
    return names, found, config


def read_trackio(folder, run):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (project,) = SQLiteStorage.get_projects()
    assert project == "ba-lora"
    runs = list(trackio.Api().runs(project))
    logs = SQLiteStorage.get_logs(project, runs[-1].name)
    found = [(log["train/global_step"], log) for log in logs]
    return [one.name for one in runs], found, json.dumps(runs[-1].config["run"])


@pytest.fixture(params=["tensorboard", "trackio"])
def tool(request, tmp_path, monkeypatch):
    pytest.importorskip(request.param, reason=f"no {request.param}: pip install -e '.[{request.param}]'")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads its folder when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return request.param


@pytest.mark.slow
def test_a_killed_run_and_its_scores_are_one_tracked_run(tool, train, tmp_path, monkeypatch):
    words = [
        f"trainer.report_to={tool}",
        "trainer.max_steps=4",
        "regularizers.consistency_schedule=cosine_to_10_percent",
    ]
    step = BALoRATrainer.training_step

    def killed(self, *arguments, **settings):
        if self.state.global_step == 3:  # after the log of step 3, and after the checkpoint of step 2
            raise KeyboardInterrupt
        return step(self, *arguments, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BALoRATrainer, "training_step", killed)
        train(*words)
    folder = train(*words)
    result = only_result(tmp_path / "results")
    assert result["training"]["resumed_from"] == "checkpoint-2"
    (folder / "scores").mkdir()
    (folder / "scores" / "toy.json").write_text(json.dumps({"metrics": {"strict": 0.25}, "n": 4}))
    assert refresh_result(folder, tmp_path / "results" / f"{result['run_id']}.json") is not None

    read = {"tensorboard": read_tensorboard, "trackio": read_trackio}[tool]
    names, found, config = read(tmp_path, folder)
    assert names == [folder.name if tool == "tensorboard" else result["run_id"]]
    assert '"rank": 4' in config or "rank: 4" in config
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    log = {entry["step"]: entry for entry in entries if "loss" in entry}
    logged = ["loss", "task", "tokens_per_second", "peak_memory_mb", "grad_norm", "learning_rate"]
    logged += [f"{kind}{term}" for kind in ("", "weighted_", "share_", "lambda_") for term in TERMS]
    for name in logged:
        tracked = {s: values[f"train/{name}"] for s, values in found if f"train/{name}" in values}
        assert sorted(tracked) == [1, 2, 3, 4], name
        if name not in ("tokens_per_second", "peak_memory_mb"):
            assert tracked == pytest.approx({s: log[s][name] for s in tracked}, rel=1e-6), name
        if tool == "tensorboard":
            assert len([values for _, values in found if f"train/{name}" in values]) == 4
    weights = [values["train/lambda_consistency"] for _, values in found if "train/lambda_consistency" in values]
    assert len(set(weights)) > 2  # λ(t), not λ
    assert [(s, v["eval/toy/strict"]) for s, v in found if "eval/toy/strict" in v] == [(4, 0.25)]

    train(*words, "overwrite=true")
    names, found, _ = read(tmp_path, folder)
    assert len(names) == 1 and not any("eval/toy/strict" in values for _, values in found)


def test_scores_that_cannot_be_tracked_are_told(train, tmp_path, monkeypatch, capsys):
    """In the environment that scores, the tracker need not be installed; the result has the scores anyway."""
    folder = train("trainer.max_steps=1")
    result = only_result(tmp_path / "results")
    path = tmp_path / "results" / f"{result['run_id']}.json"
    result["config"]["trainer"]["report_to"] = ["wandb"]
    path.write_text(json.dumps(result))
    (folder / "scores").mkdir()
    (folder / "scores" / "toy.json").write_text(json.dumps({"metrics": {"strict": 0.25}, "n": 4}))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert refresh_result(folder, path)["evaluation"]["toy"]["metrics"] == {"strict": 0.25}
    assert f"{result['run_id']}: its scores are not in wandb: " in capsys.readouterr().err


def test_the_name_of_a_tracked_run_is_the_runs():
    refused("trainer.run_name=mine", match="tracked runs have the run's id")


def test_a_run_that_starts_over_replaces_what_wandb_wrote_of_it_only(monkeypatch, tmp_path):
    """W&B is in no requirements: a stand-in notes what it is asked for."""
    asked = []
    stand_in = types.SimpleNamespace(
        init=lambda **settings: asked.append(settings), config=types.SimpleNamespace(update=lambda *_, **__: None)
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    config = load_config("toy", method="lora", overrides=[f"output_dir={tmp_path}/toy-1[a]"])
    files = [
        config.run_path / "wandb" / f"offline-run-20260101_000000-{name}" / "run.wandb"
        for name in ("toy-1[a]", "toy-1a")
    ]
    for file in files:
        file.parent.mkdir(parents=True)
    arguments = types.SimpleNamespace(run_name="toy-1[a]", project="p")
    callback = types.SimpleNamespace(setup=lambda *_: None)
    for step, there in ((5, [True, True]), (0, [False, True])):
        _open_wandb(config, callback, arguments, types.SimpleNamespace(global_step=step), None)
        assert [file.parent.is_dir() for file in files] == there
    assert [settings["resume"] for settings in asked] == ["allow", None]


def test_tensorboards_folder_may_be_chosen_and_each_run_has_its_own(monkeypatch, tmp_path):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    assert _tensorboard_folder(tmp_path / "toy-1") == tmp_path / "toy-1"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/logs")
    first, second = (_tensorboard_folder(tmp_path / name / "toy-1") for name in ("a", "b"))
    assert first.parent == Path("/logs") and first.name.startswith("toy-1-") and first != second
