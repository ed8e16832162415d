"""ba_lora/results_nlu.py: tables over seeds, by hand."""

import json
import sys

import pytest

from ba_lora.errors import UserError
from ba_lora.results_nlu import main


def result(method: str, seed: int, best: float, last: float, yelp: float | None) -> dict:
    dev = {"task": "sst2", "of_task": "sst2", "n": 872, "invalid": 0, "metrics": {"accuracy": best}}
    drop = None if yelp is None else best - yelp
    other = {"of_task": "sst2", "n": 1000, "metrics": {"accuracy": yelp}, "in_domain": best, "drop": drop}
    epochs = {
        which: {"epoch": 1, "step": 9, "metrics": {"sst2": {"accuracy": value}, "heldout": {"accuracy": 1.0}}}
        for which, value in (("best", best), ("last", last))
    }
    return {
        "base": "minilm",
        "method": method,
        "seed": seed,
        "training": {"selection": {"protocol": "tuned", **epochs}},
        "evaluation": {"sst2": dev, "yelp": other},
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
        "| minilm | sst2 | accuracy | yelp | lora | 82.00 ± 2.83 | 71.00 ± 1.41 | 11.00 ± 1.41 | 1000 | 1, 2 |",
        "| minilm | sst2 | accuracy | yelp | pissa | 81.00 | undefined | undefined | 1000 | 1 |",
    ]


def test_only_finished_nlu_runs(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"training": None}))
    monkeypatch.setattr(sys, "argv", ["results_nlu", str(tmp_path / "a.json")])
    with pytest.raises(UserError, match="is no result of a finished NLU run"):
        main()
