"""The page of a search and the comparison of engines follow from its trials.json."""

import json
from random import Random

import pytest

from ba_lora.errors import UserError
from ba_lora.experiments.search.space import load_space
from eval.report.search import importances, main, write_comparison, write_search_report
from eval.report.search_trials import read_search, short_names


def made(folder, engine, seed, values, *, objective="heldout_loss"):
    """Write a search over the toy's space whose trials have these values; None: failed, a tuple: pruned."""
    import dataclasses

    space = dataclasses.replace(
        load_space("toy", typed={"engine": engine, "search_seed": seed, "trials": len(values)}), objective=objective
    )
    trials = []
    for number, value in enumerate(values):
        status = "failed" if value is None else "pruned" if isinstance(value, tuple) else "complete"
        value = value[0] if status == "pruned" else value
        random = Random(number)
        shares = [random.random() for _ in space.parameters]
        settings = {
            parameter.key: parameter.at(share) for parameter, share in zip(space.parameters, shares, strict=True)
        }
        facts = {"seconds": 2.0, "runs": [{"peak_memory_mb": 100.0 + number}]} if status == "complete" else {}
        facts |= {"error": "out of memory"} if status == "failed" else {}
        trials.append(
            {"number": number, "status": status, "words": space.words(settings), "values": settings, "value": value}
            | facts
        )
    whole = [t for t in trials if t["status"] == "complete"]
    better = max if objective == "heldout_accuracy" else min
    best = better(whole, key=lambda t: t["value"])["number"] if whole else None
    folder.mkdir(parents=True)
    facts = {
        "title": "T",
        "space": space.identity(),
        "hardware": "a CPU",
        "ended_early": None,
        "best": best,
        "trials": trials,
    }
    (folder / "trials.json").write_text(json.dumps(facts))
    return read_search(folder)


def test_a_page_of_one_search(tmp_path, capsys, monkeypatch):
    made(tmp_path / "s", "tpe", 0, [1.0, None, 0.5, (3.0,), 0.75, 0.9])
    monkeypatch.setattr("sys.argv", ["search", str(tmp_path / "s")])
    assert main() == 0
    page = (tmp_path / "s" / "report.md").read_text()
    assert page in capsys.readouterr().out
    assert "Best: trial 2, heldout_loss 0.5" in page and "- 4 complete, 1 failed, 1 pruned" in page
    assert "- 8 s of training and evaluation, 2.0 s a trial" in page and "- at most 105 MiB" in page
    assert "| 1 | failed: out of memory |" in page and "| 3 | pruned | 3 |" in page
    names = {path.name for path in (tmp_path / "s" / "figures").iterdir()}
    assert names == {f"{name}.png" for name in ("history", "importances", "slice", "parallel_coordinates")}


def test_importance_goes_to_what_decides(tmp_path):
    """The value is made a function of the rank only."""
    search = made(tmp_path / "s", "random", 0, [0.0] * 40)
    for trial in search.trials:
        trial["value"] = float(trial["values"]["adapter.rank"])
    found = importances(search)
    assert max(found, key=found.get) == "rank" and sum(found.values()) == pytest.approx(1)
    assert importances(made(tmp_path / "few", "random", 0, [1.0, 2.0])) == {}
    assert importances(made(tmp_path / "flat", "random", 0, [1.0] * 9)) == {}


def test_a_search_without_a_whole_trial_has_a_page(tmp_path):
    write_search_report(made(tmp_path / "s", "tpe", 0, [None, (2.0,)]))
    assert "Best" not in (tmp_path / "s" / "report.md").read_text()


@pytest.mark.parametrize(("objective", "winner"), [("heldout_loss", "tpe"), ("heldout_accuracy", "random")])
def test_engines_are_told_apart_only_where_the_interval_says_so(tmp_path, objective, winner):
    searches = [
        made(tmp_path / f"{engine}{seed}", engine, seed, [0.9, low + seed / 1000, 0.8], objective=objective)
        for engine, low in (("tpe", 0.1), ("random", 0.5))
        for seed in (0, 1, 2)
    ]
    if objective == "heldout_accuracy":  # the best of each is its first trial: no spread, no interval
        for search in searches:
            for trial in search.trials:
                trial["value"] = 0.1 if search.space["engine"] == "tpe" else 0.5
            search.trials[0]["value"] += search.space["search_seed"] / 1000
    write_comparison(searches, tmp_path / "all")
    facts = json.loads((tmp_path / "all" / "engines.json").read_text())
    (difference,) = facts["differences"]
    assert difference["difference"] == pytest.approx(-0.4) and difference["interval"][1] < 0
    page = (tmp_path / "all" / "engines.md").read_text()
    assert f"{winner} better than" in page and (tmp_path / "all" / "engines.png").is_file()
    assert facts["engines"]["tpe"]["mean_best_so_far"][-1] == pytest.approx(facts["engines"]["tpe"]["mean_best"])


def test_searches_that_do_not_differ_are_not_told_apart(tmp_path):
    searches = [
        made(tmp_path / f"{engine}{seed}", engine, seed, [1.0, value])
        for engine, values in (("tpe", (0.2, 0.8)), ("random", (0.3, 0.75)))
        for seed, value in enumerate(values)
    ]
    write_comparison(searches, tmp_path / "all")
    assert "do not tell the engines apart" in (tmp_path / "all" / "engines.md").read_text()


def test_an_engine_may_begin_with_trials_that_fail(tmp_path):
    searches = [made(tmp_path / "a", "tpe", 0, [None, 2.0]), made(tmp_path / "b", "random", 0, [1.0, 3.0])]
    write_comparison(searches, tmp_path / "all")
    facts = json.loads((tmp_path / "all" / "engines.json").read_text())
    assert facts["engines"]["tpe"]["mean_best_so_far"] == [None, 2.0] and facts["engines"]["tpe"]["failed"] == 1
    without = made(tmp_path / "c", "random", 1, [None, (1.0,)])
    with pytest.raises(UserError, match="/c has no trial that is complete: leave it out"):
        write_comparison([*searches, without], tmp_path / "all")


def test_what_cannot_be_compared_or_read(tmp_path):
    one, other = made(tmp_path / "a", "tpe", 0, [1.0, 2.0]), made(tmp_path / "b", "random", 0, [1.0])
    with pytest.raises(UserError, match="differ in trials"):
        write_comparison([one, other], tmp_path / "all")
    with pytest.raises(UserError, match="trials.json is not there or damaged"):
        read_search(tmp_path / "nothing")
    (tmp_path / "a" / "trials.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        read_search(tmp_path / "a")


def test_names_are_short_where_they_stay_apart():
    assert short_names(["a.b", "c.d", "e.d"]) == {"a.b": "b", "c.d": "c.d", "e.d": "e.d"}
