"""Whose a run's folder and result are: what is taken up, what starts over, what is never touched."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ba_lora.config.layers import load_config, load_run
from ba_lora.config.schema import to_yaml
from ba_lora.errors import UserError
from ba_lora.experiments.pipeline import prepare_evaluation
from ba_lora.experiments.spec import untuned_config
from ba_lora.io import read_json, write_json_atomic
from ba_lora.models.source import folder_hash, model_source
from ba_lora.runs import folder as run
from ba_lora.runs.folder import (
    CLAIM,
    claimed_folder,
    is_finished,
    is_trained,
    keep_base,
    keep_factors,
    recorded,
    untuned_base_changed,
)
from ba_lora.runs.results import assemble, result_fault, write_result
from tests.support.tiny import only_result, save_tiny_model


@pytest.fixture
def configured(tmp_path, tiny_model):
    """A config by overrides: `configured("seed=3")`."""

    def make(*words, name="run"):
        own = [f"output_dir={tmp_path / name}", f"results_dir={tmp_path / 'results'}", f"model.name={tiny_model}"]
        return load_config("configs/nlg/toy.yaml", overrides=[*own, *words])

    return make


def claim(config, **keywords):
    with claimed_folder(config, **keywords):
        pass


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(path, text="words"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def give_checkpoint(path):
    """Make the run one that has something to lose."""
    put(path / "checkpoints" / "checkpoint-2" / "files.json", "{}")


def trained(config):
    """Claim the folder and finish it as a run does, with made-up weights."""
    claim(config)
    for name in ("adapter", "lora", "merged"):
        put(config.run_path / name / "adapter_model.safetensors", name)
    return run.finish_run(config.run_path, config, {"training": {"steps": 1}})


# ---- results


def test_two_folders_of_one_name_have_two_results(configured, tmp_path):
    one, two = configured(name="a/run1"), configured("seed=3", name="b/run1")
    for config in (one, two):
        trained(config)
    written = {path.stem for path in (tmp_path / "results").iterdir()}
    assert written == {one.run_id, two.run_id}
    assert [read_json(config.result_path)["seed"] for config in (one, two)] == [42, 3]
    assert all(read_json(path)["run_id"] == path.stem for path in (tmp_path / "results").iterdir())


def test_a_folder_named_by_the_id_and_a_suffix_has_a_result_of_its_own(tmp_path):
    plain = load_config("configs/nlg/toy.yaml")
    suffixed = load_config("configs/nlg/toy.yaml", overrides=[f"output_dir={tmp_path / plain.run_id}-vllm"])
    assert suffixed.result_path.name == f"{plain.run_id}-vllm.json" and suffixed.run_id == plain.run_id


def test_a_result_of_another_config_is_never_replaced(configured):
    config, other = configured(), configured("seed=3")
    result = assemble(config.run_path, other)
    write_json_atomic(config.result_path, result)
    with pytest.raises(UserError, match="is the result of another config: .*overwrite=true replaces it"):
        claim(config)
    assert [path.name for path in config.run_path.parent.iterdir()] == ["results"], "not even a lock"
    with pytest.raises(UserError, match="is the result of another config"):
        write_result(config.run_path, config)
    assert read_json(config.result_path) == result and not config.run_path.exists()
    claim(configured("overwrite=true"))
    assert not config.result_path.exists()


def test_another_folder_of_the_same_config_says_that_it_replaces_the_result(configured, capsys):
    trained(configured(name="a"))
    capsys.readouterr()
    claim(configured(name="b"))
    assert "is of this config, made in another folder: this run's result replaces it" in capsys.readouterr().out


def test_a_failed_attempt_does_not_replace_a_result(configured):
    good = trained(configured(name="a"))
    config = configured(name="b")
    claim(config)
    (config.run_path / "checkpoints").mkdir()  # the trainer was made
    with pytest.raises(UserError, match="loss is not finite"), recorded(config.run_path, config, main=True):
        raise UserError("loss is not finite at step 3")
    assert read_json(config.run_path / "train.json")["status"] == "failed"
    assert only_result(config.result_path.parent) == good


def test_a_folder_in_the_results_place_is_told_before_anything(configured, tmp_path):
    config = configured()
    config.result_path.mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder, and the run's result"):
        claim(config)
    assert not (tmp_path / "run").exists()


def test_the_result_of_a_run_killed_before_it_was_written_comes(train, tmp_path, capsys):
    folder = train(method="lora")
    result = only_result(tmp_path / "results")
    for path in (tmp_path / "results").iterdir():
        path.unlink()
    train(method="lora")
    assert "is trained already" in capsys.readouterr().out
    assert only_result(tmp_path / "results") == result and is_finished_after(folder, tmp_path)


def is_finished_after(folder, tmp_path):
    config = load_run(folder)
    config.results_dir = str(tmp_path / "results")
    return result_fault(config) is None and is_finished(config)


# ---- a run that has nothing to lose starts over


def test_a_failure_before_training_leaves_nothing(train, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": 5, "response": ""}\n')
    with pytest.raises(UserError):
        train("data.name=metamathqa", f"data.source={rows}")
    assert not list(tmp_path.glob("*run*")) and not list(tmp_path.glob("results/*"))
    rows.write_text('{"query": "two and two?", "response": "4"}\n' * 8)
    folder = train("data.name=metamathqa", f"data.source={rows}")
    assert read_json(folder / "train.json")["status"] == "ok"


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_only_a_run_with_a_checkpoint_is_held_by_its_config_and_data(configured, tmp_path, has_checkpoint):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("before")
    words = ["data.name=metamathqa", f"data.source={rows}"]
    claim(configured(*words))
    path = tmp_path / "run"
    put(path / "initial" / "initial_factors.safetensors")
    if has_checkpoint:
        give_checkpoint(path)
    before = files(path)
    rows.write_text("after")
    changes = [
        (words, {}, "has changed since run was started"),
        ([*words, "trainer.learning_rate=0.5"], {}, "holds a run of another config"),
        (words, {"num_processes": 2}, "has changed since|was started on 1 processes"),
    ]
    for overrides, more, message in changes:
        if has_checkpoint:
            with pytest.raises(UserError, match=message):
                claim(configured(*overrides), **more)
            assert files(path) == before
        else:
            claim(configured(*overrides), **more)
            assert sorted(files(path)) == [CLAIM, "config.yaml"]
            assert read_json(path / CLAIM)["num_processes"] == more.get("num_processes", 1)


def test_rows_that_are_gone_take_no_run_away(configured, tmp_path):
    """As where a disk is not mounted. overwrite=true says which file it lacks, and removes nothing."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("before")
    config = configured("data.name=metamathqa", f"data.source={rows}")
    trained(config)
    config.result_path.parent.mkdir(exist_ok=True)
    config.result_path.write_text("{}")
    before = files(tmp_path / "run")
    rows.unlink()
    claim(config)  # it is trained, and nothing says that its rows were others
    with pytest.raises(UserError, match="no such file: .*rows.jsonl"):
        claim(configured("data.name=metamathqa", f"data.source={rows}", "overwrite=true"))
    assert files(tmp_path / "run").keys() == before.keys() and config.result_path.is_file()
    rows.write_text("after")
    with pytest.raises(UserError, match="rows.jsonl has changed since run was started"):
        claim(config)


def test_what_torchrun_starts_again_goes_on_whatever_was_typed(configured, tmp_path, monkeypatch):
    config = configured("overwrite=true")
    claim(config)
    give_checkpoint(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    claim(config)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    claim(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("no such file: rows.jsonl")])
def test_an_export_that_fails_again_takes_no_finished_run_away(configured, error, capsys):
    """checkpoints/ is gone by the user's hand, and merged/ was cut short."""
    config = configured()
    trained(config)
    put(config.run_path / "scores" / "toy.json")
    put(config.run_path / "merged" / "adapter_model.safetensors", "cut")
    before = files(config.run_path)
    claim(configured())
    assert "it is trained again from the start" in capsys.readouterr().out
    with pytest.raises(type(error)), recorded(config.run_path, config, main=True):
        raise error
    after = files(config.run_path)
    assert after.pop("train.json") != before.pop("train.json") and after == before
    assert read_json(config.result_path)["status"] == "ok"


def test_a_failed_run_stays_one_where_somebody_else_has_put_something(configured, tmp_path):
    kept = ["judgements/mt_bench.jsonl", "notes.txt"]
    claim(configured())
    for name in kept:
        put(tmp_path / "run" / name)
    with pytest.raises(UserError), recorded(tmp_path / "run", configured(), main=True):
        raise UserError("before the training")
    assert sorted(files(tmp_path / "run")) == sorted([*kept, CLAIM, "config.yaml"])
    claim(configured("seed=5"))
    assert load_run(tmp_path / "run").seed == 5


@pytest.mark.parametrize("setting", [{"report_to": "wandb"}, {"deepspeed": "/gone/ds.json"}, {"max_steps": 0}])
def test_a_run_is_read_where_it_could_not_be_trained(configured, setting, monkeypatch):
    """Without wandb, without the moved file, with a value that is refused today."""
    config = configured()
    trained(config)
    config.trainer |= setting
    (config.run_path / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "wandb" else find_spec(name))
    with pytest.raises(UserError):
        load_config(config.run_path / "config.yaml")
    assert load_run(config.run_path).trainer == config.trainer and run.is_run_folder(config.run_path)


# ---- overwrite=true


@pytest.mark.parametrize("found", ["config.yaml", CLAIM, "both"])
def test_overwrite_never_empties_a_foreign_folder(configured, tmp_path, found):
    """A config.yaml of something else, or a claim by itself, makes no run's folder."""
    path = tmp_path / "run"
    put(path / "thesis.tex")
    if found != CLAIM:
        put(path / "config.yaml", "title: my thesis\n" if found == "both" else to_yaml(configured()))
    if found != "config.yaml":
        put(path / CLAIM, json.dumps({"num_processes": 1, "source_sha256": None}))
    before = files(path)
    for words in ([], ["overwrite=true"]):
        with pytest.raises(UserError, match="no run's folder"):
            claim(configured(*words))
        assert files(path) == before


def test_overwrite_removes_only_what_a_run_writes(configured, tmp_path):
    config = configured()
    trained(config)
    give_checkpoint(config.run_path)
    kept = ["notes/thesis.tex", "checkpoints/checkpoint-final/model.safetensors", "checkpoints/mine.txt", "plot.png"]
    for name in kept:
        put(config.run_path / name)
    put(config.run_path / ".merged.0123abcd.tmp" / "half")
    put(config.run_path / "scores" / "toy.json")
    claim(configured("overwrite=true"))
    assert sorted(files(config.run_path)) == sorted([*kept, CLAIM, "config.yaml"])
    assert not config.result_path.exists()


def test_a_link_in_a_run_is_removed_and_not_followed(configured, tmp_path):
    config = configured()
    trained(config)
    put(tmp_path / "elsewhere" / "thesis.tex")
    (config.run_path / "merged" / "adapter_model.safetensors").unlink()
    (config.run_path / "merged").rmdir()
    (config.run_path / "merged").symlink_to(tmp_path / "elsewhere")
    claim(configured("overwrite=true"))
    assert (tmp_path / "elsewhere" / "thesis.tex").read_text() == "words"


def test_a_folder_of_a_process_killed_while_it_made_it_is_taken_up(configured, tmp_path):
    put(tmp_path / "run" / CLAIM, json.dumps({"num_processes": 1, "source_sha256": None}))
    put(tmp_path / "run" / ".config.yaml.0123abcd.tmp")
    claim(configured("seed=5"))
    assert load_config(tmp_path / "run" / "config.yaml").seed == 5


# ---- damaged files


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"num_processes": "two", "source_sha256": null}'])
@pytest.mark.parametrize("word", ["overwrite=false", "overwrite=true"])
def test_a_damaged_claim_is_one_line_and_nothing_is_touched(configured, text, word):
    config = configured()
    trained(config)
    (config.run_path / CLAIM).write_text(text)
    before = files(config.run_path)
    with pytest.raises(UserError, match="claim.json or config.yaml is damaged: nothing in it is touched") as caught:
        claim(configured(word))
    assert "\n" not in str(caught.value) and files(config.run_path) == before and not is_finished(config)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"ok"', "\x00"])
def test_a_damaged_train_json_is_no_trained_run(configured, capsys, text):
    config = configured()
    trained(config)
    assert is_trained(config.run_path, config)
    (config.run_path / "train.json").write_text(text)
    assert not is_trained(config.run_path, config) and not is_finished(config)
    with pytest.raises(UserError, match="train.json is gone or damaged"):
        assemble(config.run_path, config)
    claim(configured())
    told = capsys.readouterr().out
    assert text == "{}" or "train.json cannot be read: no checkpoint is left to export it from: it is trained" in told


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"metrics": {}}'])
def test_a_damaged_score_is_one_line(configured, text):
    config = configured()
    trained(config)
    put(config.run_path / "scores" / "toy.json", text)
    with pytest.raises(UserError, match="scores/toy.json is gone or damaged: delete it, and score the run again"):
        assemble(config.run_path, config)


# ---- what a resumed run must find as it was


@pytest.mark.parametrize("changed", ["base", "initial"])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_the_base_and_the_first_factors_are_those_of_the_start(configured, tmp_path, changed, has_checkpoint):
    base = save_tiny_model(tmp_path / "base")
    word = f"model.name={base}"
    config = configured(word)
    claim(config)
    keep_base(config, commit=None)
    factors = config.run_path / "initial" / "initial_factors.safetensors"
    put(factors)
    keep_factors(config)
    if has_checkpoint:
        give_checkpoint(config.run_path)
    claim(configured(word))  # nothing has changed
    assert factors.is_file()
    file = factors if changed == "initial" else base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    if has_checkpoint:
        with pytest.raises(UserError, match="has changed since run was started: bring it back, or overwrite=true"):
            claim(configured(word))
        assert factors.is_file()
    else:
        claim(configured(word))
        assert not factors.exists() and "base" not in read_json(config.run_path / CLAIM)


def test_a_trained_run_is_not_that_of_a_base_that_was_replaced(configured, tmp_path):
    base = save_tiny_model(tmp_path / "base")
    word = f"model.name={base}"
    config = configured(word)
    with claimed_folder(config):
        keep_base(config, commit=None)
    trained(config)
    assert is_finished(config)
    weights, content = base / "model.safetensors", (base / "model.safetensors").read_bytes()
    weights.write_bytes(content)  # newer, and the same
    assert is_finished(config)
    weights.write_bytes(bytes([content[0], *content[1:-1], content[-1] ^ 1]))
    assert not is_finished(config)
    with pytest.raises(UserError, match="the base .* has changed since run was trained: overwrite=true redoes it"):
        claim(configured(word))


def test_the_pretrained_model_is_evaluated_anew_where_its_folder_was_replaced(configured, tmp_path):
    base = save_tiny_model(tmp_path / "base")
    config = untuned_config(configured(f"model.name={base}"))
    config.output_dir = str(tmp_path / "untuned")
    prepare_evaluation(config)
    before = (config.run_path / "train.json").read_text()
    prepare_evaluation(config)
    assert (config.run_path / "train.json").read_text() == before and not untuned_base_changed(config)
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert untuned_base_changed(config)
    prepare_evaluation(config)
    assert (config.run_path / "train.json").read_text() != before and not untuned_base_changed(config)


def test_a_base_that_moves_on_the_hub_is_not_mixed_with_itself(configured):
    config = configured()
    claim(config)
    factors = config.run_path / "initial" / "initial_factors.safetensors"
    put(factors)  # of a base that no claim names
    keep_base(config, commit="a" * 40)
    assert not factors.exists()
    for killed_before_the_factors_were_noted in (True, False):
        put(factors)
        if not killed_before_the_factors_were_noted:
            keep_factors(config)
        keep_base(config, commit="a" * 40)
        assert factors.is_file(), "the same base"
        keep_base(config, commit="b" * 40)  # nothing was trained
        assert not factors.exists() and "initial" not in read_json(config.run_path / CLAIM)
        keep_base(config, commit="a" * 40)
    put(factors)
    give_checkpoint(config.run_path)
    with pytest.raises(UserError, match=f"was {'a' * 40} when run was started and is {'c' * 40} now"):
        keep_base(config, commit="c" * 40)
    assert factors.is_file()


def test_only_the_files_of_a_model_are_hashed(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    before = folder_hash(base)
    for name in ("notes.txt", "trainer_state.json", "generation_config.json", "README.md"):
        put(base / name)
    assert folder_hash(base) == before and folder_hash(tmp_path / "none") is None
    put(base / "modeling.py")
    assert folder_hash(base) != before


def test_one_flipped_byte_in_the_first_factors_stops_a_resumed_run(train, tmp_path):
    folder = train("trainer.max_steps=4", "trainer.save_steps=2")
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    (folder / "train.json").unlink()
    file = folder / "initial" / "initial_factors.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="initial has changed since run was started"):
        train("trainer.max_steps=4", "trainer.save_steps=2")
    content[-5] ^= 1
    file.write_bytes(content)
    train("trainer.max_steps=4", "trainer.save_steps=2")
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert Path(model_source(load_run(folder).model)).is_dir() and read_json(folder / CLAIM)["base"]


@pytest.mark.parametrize("damage", ["gone", "cut", "empty folder"])
def test_damaged_exports_are_seen_and_made_again(train, tmp_path, capsys, damage):
    folder = train("trainer.max_steps=4", "trainer.save_steps=2")
    weights = folder / "lora" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage == "cut":
        weights.write_bytes(content[:-3])
    if damage == "empty folder":
        for file in (folder / "lora").iterdir():
            file.unlink()
    config = load_run(folder)
    config.results_dir = str(tmp_path / "results")
    assert not is_trained(folder, config) and not is_finished(config)
    capsys.readouterr()
    train("trainer.max_steps=4", "trainer.save_steps=2")
    told = capsys.readouterr().out
    assert {"gone": "lora/ has no weights", "cut": "bytes instead of", "empty folder": "lora/ has no weights"}[
        damage
    ] in told
    assert "it is exported again" in told and "resumed from step 4 of 4" in told
    assert weights.read_bytes() == content and is_trained(folder, config)


# ---- how a run ends


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("loss is not finite at step 3: lower trainer.learning_rate"), "failed"),
        (FloatingPointError("nan"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (KeyboardInterrupt(), "cancelled"),
    ],
)
@pytest.mark.parametrize("kind", ["nlg", "nlu"])
def test_an_end_in_training_is_recorded(configured, tmp_path, error, status, kind):
    config = configured()
    if kind == "nlu":
        words = ["task=toy_pairs", f"output_dir={tmp_path / 'run'}", f"results_dir={tmp_path / 'results'}"]
        config = load_config("configs/nlu/toy.yaml", overrides=words, kind="nlu")
    claim(config)
    (config.run_path / "checkpoints").mkdir()
    with pytest.raises(BaseException), recorded(config.run_path, config, main=True):  # noqa: B017, PT011
        raise error
    assert read_json(config.run_path / "train.json")["status"] == status
    assert only_result(tmp_path / "results")["status"] == status


def test_the_result_tells_of_a_full_disk(configured, monkeypatch):
    """The run's own disk takes nothing more; results lie on another one."""
    config = configured()
    claim(config)
    (config.run_path / "checkpoints").mkdir()

    def full(path, value):
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(run, "write_json_atomic", full)
    with pytest.raises(UserError, match="no disk space left"), recorded(config.run_path, config, main=True):
        raise OSError(28, os.strerror(28))
    result = only_result(config.result_path.parent)
    assert (result["status"], "No space left" in result["error"]) == ("failed", True)
