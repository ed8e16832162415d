"""ba_lora/runs/results_nlu.py: tables over seeds, by hand."""

import dataclasses
import json
import sys

import pytest

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.runs.results_nlu import main, out_of_domain_table, seeds_table
from tests.conftest import ROOT


def result(method: str, seed: int, best: float, last: float, yelp: float | None, *overrides: str) -> dict:
    words = ["task=sst2", "nlu.selection=tuned", f"seed={seed}", *overrides]
    config = load_config(ROOT / "configs/nlu/minilm.yaml", method=method, overrides=words, kind="nlu")
    dev = {"task": "sst2", "of_task": "sst2", "n": 872, "invalid": 0, "metrics": {"accuracy": best}}
    drop = None if yelp is None else best - yelp
    other = {"of_task": "sst2", "n": 1000, "metrics": {"accuracy": yelp}, "in_domain": best, "drop": drop}
    versions = {"version": 1, "data_sha256": "d" * 64}
    epochs = {
        which: {"epoch": 1, "step": 9, "metrics": {"sst2": {"accuracy": value}, "heldout": {"accuracy": 1.0}}}
        for which, value in (("best", best), ("last", last))
    }
    return {
        "run_id": config.run_id,
        "base": "minilm",
        "method": method,
        "seed": seed,
        "config": dataclasses.asdict(config),
        "model": {"name": config.model.name, "revision": None},
        "data": {"source": config.data.source, "revision": None, "sha256": "a" * 64},
        "training": {"num_processes": 1, "selection": {"protocol": "tuned", **epochs}},
        "evaluation": {"sst2": dev | versions, "yelp": other | versions},
    }


def test_tables_over_seeds(tmp_path, monkeypatch, capsys) -> None:
    runs = [
        result("lora", 1, 0.80, 0.79, 0.70),
        result("lora", 2, 0.84, 0.84, 0.72),
        result("pissa", 1, 0.81, 0.81, None),  # Matthews of one class, say: undefined
    ]
    files = [tmp_path / f"{index}.json" for index in range(len(runs))]
    for file, run in zip(files, runs, strict=True):
        file.write_text(json.dumps(run))
    monkeypatch.setattr(sys, "argv", ["results_nlu", *map(str, files)])
    main()
    dev, other = capsys.readouterr().out.strip().split("\n\n")
    assert dev.splitlines()[2:] == [
        "| minilm | sst2 | accuracy | tuned | lora | 82.00 ± 2.83 | 81.50 ± 3.54 | 872 | 1, 2 |",
        "| minilm | sst2 | accuracy | tuned | pissa | 81.00 | 81.00 | 872 | 1 |",
    ]
    assert other.splitlines()[2:] == [
        "| minilm | sst2 | accuracy | yelp | tuned | lora | 82.00 ± 2.83 | 71.00 ± 1.41 | 11.00 ± 1.41 | 1000 | 1, 2 |",
        "| minilm | sst2 | accuracy | yelp | tuned | pissa | 81.00 | undefined | undefined | 1000 | 1 |",
    ]


@pytest.mark.parametrize("table", [seeds_table, out_of_domain_table])
@pytest.mark.parametrize(
    ("seed", "overrides", "message"),
    [
        (1, ["data.num_rows=50"], "differ in more than the seed: data.num_rows None → 50;"),
        (2, ["data.class_shares={positive: 0.1}"], "the seed: data.class_shares.positive None → 0.1;"),
        (2, ["trainer.learning_rate=0.1", "adapter.rank=4"], "adapter.rank 8 → 4 and 1 more;"),
        (2, ["regularizers.lambda_svd=1"], "regularizers.lambda_svd .* → 1"),
        (1, ["reference.cache=elsewhere"], r"minilm-sst2-ba_lora-s1-(\w+) and .* are both of seed 1: give one of them"),
    ],
)
def test_runs_that_are_no_repetitions_are_not_averaged(table, seed, overrides, message) -> None:
    runs = [result("ba_lora", 1, 0.8, 0.8, 0.7), result("ba_lora", seed, 0.8, 0.8, 0.7, *overrides)]
    with pytest.raises(UserError, match=message) as error:
        table(runs)
    text = str(error.value)
    assert all(run["run_id"] in text for run in runs) and "\n" not in text


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data", "sha256"), "b" * 64, f"data.sha256 {'a' * 64} → {'b' * 64}"),
        (("model", "revision"), "c" * 40, "model.commit None → ccc"),
        (("training", "num_processes"), 2, "num_processes 1 → 2"),
        (("evaluation", "sst2", "data_sha256"), "e" * 64, "evaluation.data_sha256 ddd"),
        (("evaluation", "sst2", "version"), 2, "evaluation.version 1 → 2"),
    ],
)
def test_what_a_run_met_counts_too(path, value, message) -> None:
    runs = [result("lora", seed, 0.8, 0.8, 0.7) for seed in (1, 2)]
    *sections, key = path
    node = runs[1]
    for section in sections:
        node = node[section]
    node[key] = value
    with pytest.raises(UserError, match=message):
        seeds_table(runs)


def test_where_files_lie_and_what_changes_no_score_is_no_difference() -> None:
    elsewhere = [
        "data.source=/other/train.jsonl", "data.dev.sst2=/other/dev.jsonl", "reference.cache=/other/cache",
        "trainer.logging_steps=1", "features.steps=[0]", "export.merged=false", "eval.tasks=[yelp]",
    ]  # fmt: skip
    runs = [result("ba_lora", 1, 0.8, 0.8, 0.7), result("ba_lora", 2, 0.8, 0.8, 0.7, *elsewhere)]
    assert "| 1, 2 |" in seeds_table(runs) and "| 1, 2 |" in out_of_domain_table(runs)


def test_only_finished_nlu_runs(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"training": None}))
    monkeypatch.setattr(sys, "argv", ["results_nlu", str(tmp_path / "a.json")])
    with pytest.raises(UserError, match="is no result of a finished NLU run"):
        main()
