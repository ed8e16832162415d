"""What --dry-run says of time and disk: measured where a like run is there, not known where none is."""

import dataclasses

import pytest

from ba_lora.experiments import estimates
from ba_lora.experiments.estimates import Measured, estimate_lines
from ba_lora.experiments.spec import Spec
from ba_lora.experiments.state import MISSING, UNFINISHED, RunState
from ba_lora.io import write_json_atomic


def resolve(*words, method="lora", kind="nlg"):
    base = {"nlg": "toy", "nlu": "minilm"}[kind]
    return Spec.resolve(f"configs/{kind}/{base}.yaml", method, words, kind=kind)


def result(spec, *, seconds, tokens=None, gpu="H100", generation=None):
    evaluation = {"toy": {"generation": {"seconds": generation}}} if generation else {}
    return {
        "config": dataclasses.asdict(spec.config),
        "data": {"tokens": tokens, "rows_used": spec.config.data.num_rows},
        "training": {"seconds": seconds},
        "evaluation": evaluation,
        "environment": {"hardware": {"gpu": gpu}, "num_processes": 1},
    }


def test_the_same_recipe_takes_the_median_time_and_the_task_its_own():
    spec = resolve("seed=1")
    results = [result(resolve(f"seed={seed}"), seconds=10 * seed, generation=5) for seed in (1, 2, 6)]
    assert Measured(results).seconds(dataclasses.asdict(spec.config)) == (25, "1 × H100")
    assert Measured(results).seconds(dataclasses.asdict(spec.config), train=False) == (5, "1 × H100")


def test_more_rows_of_the_same_data_are_counted_in_tokens():
    """1000 rows of 20,000 tokens, 2 epochs in 40 s: 1000 tokens a second; 4000 rows, 1 epoch: 80,000 tokens."""
    results = [result(resolve("data.num_rows=1000"), seconds=40, tokens=20_000)]
    longer = dataclasses.asdict(resolve("data.num_rows=4000", "trainer.num_train_epochs=1").config)
    assert Measured(results).seconds(longer) == (pytest.approx(80), "1 × H100")


def test_what_nobody_measured_is_not_known():
    results = [result(resolve(), seconds=40, tokens=20_000), result(resolve("task=rte", kind="nlu"), seconds=9)]
    measured = Measured(results)
    for spec in (resolve("model.name=data/toy/noisy"), resolve("trainer.max_steps=7"), resolve(method="pissa")):
        assert measured.seconds(dataclasses.asdict(spec.config)) is None
    assert measured.seconds(dataclasses.asdict(resolve("task=rte", "seed=5", kind="nlu").config)) == (9, "1 × H100")
    assert measured.seconds(dataclasses.asdict(resolve("task=mrpc", kind="nlu").config)) is None


def test_times_of_other_hardware_are_not_mixed_in():
    results = [result(resolve(f"seed={seed}"), seconds=10) for seed in (1, 2)]
    results.append(result(resolve("seed=3"), seconds=1000, gpu=None))
    assert Measured(results).seconds(dataclasses.asdict(resolve().config)) == (10, "1 × H100")


def test_the_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "PROJECT_ROOT", tmp_path)
    known = resolve("task=sst2", "seed=1", kind="nlu")
    write_json_atomic(tmp_path / "results" / "runs" / "one.json", result(known, seconds=7200))
    folder = tmp_path / "outputs" / known.config.run_id
    write_json_atomic(folder / "train.json", {})
    (folder / "weights").write_bytes(b"0" * 3_000_000)
    specs = [resolve("task=sst2", f"seed={seed}", kind="nlu") for seed in (2, 3)] + [resolve()]
    train = RunState(MISSING, train=True)
    lines = estimate_lines([(spec, train) for spec in specs], results_path=tmp_path / "results")
    assert lines[0] == "time: about 4 hours of 1 × H100, for one run at a time"
    assert lines[1] == "time: not known for 1 of 3 runs: none like them has been measured"
    assert lines[2].endswith("GB are free, about 0.006 GB are needed for 2 runs")
    assert lines[3].startswith("disk: not known for 1 runs")


def test_a_trained_run_costs_no_training_and_a_scoring_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "PROJECT_ROOT", tmp_path)
    spec = resolve("seed=1")
    write_json_atomic(tmp_path / "runs" / "one.json", result(resolve(), seconds=36000, generation=3600))
    write_json_atomic(tmp_path / "outputs" / spec.config.run_id / "train.json", {"size": "x" * 2_000_000})

    def lines(**todo):
        return estimate_lines([(spec, RunState(UNFINISHED, **todo))], results_path=tmp_path)

    whole, disk = lines(train=True)
    assert whole.startswith("time: about 11 hours of 1 × H100") and "are needed for 1 runs" in disk
    generated, disk = lines()
    assert generated.startswith("time: about 1 hours of 1 × H100") and disk.endswith("GB are free")
    for todo in ("regrade", "record"):
        (disk,) = lines(**{todo: True})
        assert disk.endswith("GB are free")


def test_generation_on_other_hardware_is_not_mixed_in():
    results = [result(resolve(f"seed={seed}"), seconds=10, generation=5) for seed in (1, 2)]
    results.append(result(resolve("seed=3"), seconds=1000, gpu=None, generation=1000))
    results.append(result(resolve("seed=4"), seconds=1000, gpu=None, generation=1000))
    results.append(result(resolve("seed=5"), seconds=10, generation=5))
    assert Measured(results).seconds(dataclasses.asdict(resolve().config)) == (15, "1 × H100")


def test_a_file_that_is_no_result_is_named_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "PROJECT_ROOT", tmp_path)
    write_json_atomic(tmp_path / "runs" / "one.json", result(resolve(), seconds=3600))
    for name, text in {"cut": '{"half', "empty": "", "foreign": '{"status": "failed"}'}.items():
        (tmp_path / "runs" / f"{name}.json").write_text(text)
    lines = estimate_lines([(resolve("seed=2"), RunState(MISSING, train=True))], results_path=tmp_path)
    named = [
        f"time: {tmp_path}/runs/{name}.json is no result, or damaged: left out" for name in ("cut", "empty", "foreign")
    ]
    assert lines[:4] == [*named, "time: about 1 hours of 1 × H100, for one run at a time"]
