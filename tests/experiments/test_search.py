"""Searches over trainings of milliseconds (tests/workers/fake_trial.py): engines, order, pruning, kill -9, failures."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml

from ba_lora.errors import UserError
from ba_lora.experiments.executors.base import Busy, Slot
from ba_lora.experiments.executors.local import LocalExecutor, group_lives
from ba_lora.experiments.search import loop, nomad
from ba_lora.experiments.search.journal import COMPLETE, FAILED, PRUNED, Journal, Outcome
from ba_lora.experiments.search.loop import Search, open_proposer
from ba_lora.experiments.search.outcome import write_outcome
from ba_lora.experiments.search.space import check_runs, load_space
from ba_lora.experiments.search.trials import TrialRuns
from tests.conftest import ROOT
from tests.support import slurm
from tests.workers import fake_trial

WORKER = ROOT / "tests" / "workers" / "fake_trial.py"
PARAMETERS = {
    "trainer.learning_rate": {"float": [1e-4, 1e-1], "log": True, "start": 1e-3, "points": 2},
    "adapter.rank": {"choice": [4, 8, 16], "start": 8},
    "adapter.dropout": {"float": [0.0, 0.5], "start": 0.25, "points": 2},
}
SPACE = {
    "title": "fake",
    "trials": 8,
    "objective": "heldout_loss",
    "overrides": ["data.heldout_share=0.1", "trainer.eval_strategy=epoch"],
    "parameters": PARAMETERS,
}


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    for name in ("training_stage", "is_trained"):
        monkeypatch.setattr(loop, name, getattr(loop, name))  # so that it is put back
    fake_trial.use()


@pytest.fixture
def write(tmp_path):
    def file(**changes):
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump(SPACE | changes, sort_keys=False))
        return path

    return file


def search(folder, path, *, workers=1, say=lambda line: None, stop_after=None, executor=None, **typed):
    """Run a search in this process; return its trials as (status, values, rounded loss)."""
    space = load_space(str(path), typed=typed)
    runs = TrialRuns(space, folder, "toy", method="lora", words=[], kind="nlg")
    journal = Journal(folder, space, {"words": []})
    slots = [Slot(f"worker {number}", {}) for number in range(workers)]
    Search(journal, runs, open_proposer(space), executor or LocalExecutor(slots), say=say).run()
    write_outcome(folder, journal, runs)
    return tried(journal)


def tried(journal):
    return [
        (trial.outcome.status, trial.values, None if trial.outcome.loss is None else round(trial.outcome.loss, 9))
        for trial in journal.trials
    ]


@pytest.mark.parametrize("engine", ["tpe", "random", "grid", "nomad"])
def test_an_engine_spends_its_budget_and_finds_what_is_better(tmp_path, write, engine):
    lines = []
    found = search(tmp_path / engine, write(), engine=engine, say=lines.append)
    assert len(found) == 8 and all(status == COMPLETE for status, _, _ in found)
    assert len({json.dumps(values) for _, values, _ in found}) == 8
    losses = [loss for _, _, loss in found]
    if engine != "grid":
        assert found[0][1] == {"trainer.learning_rate": 1e-3, "adapter.rank": 8, "adapter.dropout": 0.25}
        assert min(losses) < losses[0]
    assert lines[-1].startswith("trial 7: complete") and f"best heldout_loss {min(losses):.5g}" in lines[-1]
    assert not list(tmp_path.glob("*/trials/*/adapter"))  # weights are not kept
    best = yaml.safe_load((tmp_path / engine / "best.yaml").read_text())
    values = found[losses.index(min(losses))][1]
    assert best["trainer"]["learning_rate"] == values["trainer.learning_rate"] and best["method"] == "lora"
    assert best["adapter"]["rank"] == values["adapter.rank"] and best["data"]["heldout_share"] is None
    with open(tmp_path / engine / "trials.csv") as file:
        assert [float(row["heldout_loss"]) for row in csv.DictReader(file)] == pytest.approx(losses)


def test_the_search_seed_decides(tmp_path, write):
    first, again, other = (
        search(tmp_path / name, write(), engine="random", search_seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again and first[1:] != other[1:]


@pytest.mark.parametrize("engine", ["tpe", pytest.param("nomad", marks=pytest.mark.slow)])
def test_trials_do_not_depend_on_how_many_trainings_run_at_once(tmp_path, write, engine):
    """Three trials are proposed ahead; one worker or three, the trials are the same."""
    one = search(tmp_path / "one", write(trials_at_once=3), engine=engine)
    three = search(tmp_path / "three", write(trials_at_once=3), engine=engine, workers=3)
    assert one == three and len(one) == 8


def test_a_trial_is_the_mean_over_its_seeds(tmp_path, write):
    (one,) = search(tmp_path / "one", write(trials=1, seeds=[10]))
    (both,) = search(tmp_path / "both", write(trials=1, seeds=[10, 30]))
    assert both[2] == pytest.approx(one[2] + 0.1)  # the fake loss has seed / 100
    facts = json.loads((tmp_path / "both" / "trials.json").read_text())["trials"][0]
    assert [run["seed"] for run in facts["runs"]] == [10, 30] and facts["seconds"] > 0


def test_what_is_worse_than_the_others_is_pruned(tmp_path, write, monkeypatch):
    judged, rule_of = [], Journal.is_pruned
    monkeypatch.setattr(
        Journal,
        "is_pruned",
        lambda self, number, seen, upto: (
            judged.append((self, number, max(seen))),
            rule_of(self, number, seen, upto=upto),
        )[1],
    )
    rule = {"percentile": 50, "startup_trials": 3, "warmup_steps": 2}
    whole = search(tmp_path / "whole", write(), engine="random")
    pruned = search(tmp_path / "pruned", write(pruning=rule), engine="random")
    again = search(tmp_path / "again", write(pruning=rule, trials_at_once=1), engine="random", workers=2)
    assert pruned == again
    assert [values for _, values, _ in pruned] == [values for _, values, _ in whole]  # random points look at no value
    statuses = [status for status, _, _ in pruned]
    assert statuses[:3] == [COMPLETE] * 3 and PRUNED in statuses
    for (status, _, loss), (_, _, at_end) in zip(pruned, whole, strict=True):
        assert loss == at_end if status == COMPLETE else loss > at_end  # the fake loss falls with the steps
    best = min(loss for status, _, loss in pruned if status == COMPLETE)
    assert best == min(loss for _, _, loss in whole)
    assert judged and len(judged) == len(set(judged))  # each evaluation once


@pytest.mark.parametrize("late", [False, True], ids=["at once", "after a look"])
def test_a_trial_that_is_pruned_and_fails_is_pruned_whenever_it_is_looked_at(tmp_path, write, monkeypatch, late):
    """Else a slower machine, or a resumed search, would tell the engine another outcome."""
    space = load_space(str(write(trials=1, pruning={"percentile": 50})))
    runs = TrialRuns(space, tmp_path / "s", "toy", method="lora", words=(), kind="nlg")
    monkeypatch.setattr(Journal, "is_pruned", lambda self, number, seen, upto: max(seen) >= 2)
    journal = Journal(tmp_path / "s", space, {})
    one = Search(journal, runs, open_proposer(space), None, say=lambda line: None)
    one._propose()
    running = one._running[0]
    path = running.spec.config.run_path
    path.mkdir(parents=True)
    entries = [{"step": step, "max_steps": 4, "eval_task": 9.0} for step in (1, 2)]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    failure = types.SimpleNamespace(stage=types.SimpleNamespace(name="train"), status=2, log_path=tmp_path / "no.log")
    running.work = types.SimpleNamespace(seconds=1.0, failures={path: [failure]}, news=[], release=lambda: None)
    one._executor = types.SimpleNamespace(forget=lambda work, path: None)
    if late:
        one._prune(running)
    monkeypatch.setattr(loop, "stage_error", lambda failure: "it failed")
    one._ended(running)
    assert (running.outcome.status, running.outcome.loss) == (PRUNED, 9.0)


def test_the_value_is_that_of_the_checkpoint_that_is_exported(tmp_path, write):
    """The best one is chosen by the loss with all terms, and the value is the task's."""
    space = load_space(str(write(trials=1)))
    runs = TrialRuns(space, tmp_path / "s", "toy", method="lora", words=(), kind="nlg")
    config = runs.spec(0, {one.key: one.at(0.5) for one in space.parameters}, 42).config
    config.run_path.mkdir(parents=True)
    entries = [{"step": step, "max_steps": 3, "eval_task": loss} for step, loss in ((1, 2.0), (2, 1.5), (3, 1.0))]
    (config.run_path / "evaluations.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for best_step, value in ((None, 1.0), (2, 1.5)):
        (config.run_path / "train.json").write_text(json.dumps({"training": {"best_step": best_step}}))
        assert runs.loss(config) == value


def test_other_training_rows_are_another_search(tmp_path, write):
    rows = tmp_path / "rows.jsonl"
    words = [f"data.source={rows}", "data.num_rows=null", "data.columns={instruction: query, response: response}"]
    found = []
    for text in ("one", "one", "two"):
        line = json.dumps({"query": f"{text}?", "response": "The answer is: 1"})
        rows.write_text("".join(line + "\n" for _ in range(40)))
        done = run(tmp_path / "s", write(trials=1), *words)
        output, _ = done.communicate(timeout=600)
        found.append((done.returncode, output))
    assert [status == 0 for status, _ in found] == [True, True, False], found
    assert "another search" in found[2][1] and found[2][1].count("error:") == 1


def run(folder, space, *words, **environment):
    return subprocess.Popen(
        [sys.executable, str(WORKER), "search", "toy", str(space), "method=lora", f"output={folder}", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(folder):
    with open(folder / "trials.csv") as file:
        return [{key: row[key] for key in row if key != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("engine", ["tpe", pytest.param("nomad", marks=pytest.mark.slow)])
def test_kill_9_and_the_same_command_make_the_trials_of_the_search_that_was_not_killed(tmp_path, write, engine):
    space = write(pruning={"percentile": 60, "startup_trials": 2})
    whole = run(tmp_path / "whole", space, f"engine={engine}")
    assert whole.wait() == 0, whole.stdout.read()
    folder = tmp_path / "killed" / f"{engine}-s0"
    for number in (2, 5):  # killed in the training of these trials
        killed = run(tmp_path / "killed", space, f"engine={engine}", FAKE_SECONDS="0.4")
        while not (folder / "trials" / f"t{number:04}-s42" / "trainings.txt").is_file():
            assert killed.poll() is None, killed.stdout.read()
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert not (folder / "trials.csv").is_file()
    with open(folder / "journal.log", "a") as file:
        file.write('{"op_code": 6, "half a li')  # as if it had been killed while it wrote
    resumed = run(tmp_path / "killed", space, f"engine={engine}")
    assert resumed.wait() == 0, resumed.stdout.read()
    assert rows(folder) == rows(tmp_path / "whole" / f"{engine}-s0")
    started = [len(path.read_text().splitlines()) for path in sorted(folder.glob("trials/*/trainings.txt"))]
    assert len(started) == 8 and sum(started) <= 8 + 2  # what was known has not been trained again
    text = resumed.stdout.read()
    assert "trials are known already" in text and "best config" in text


def test_a_finished_search_is_printed_again(tmp_path, write):
    space = write(trials=2)
    for _ in range(2):
        done = run(tmp_path / "s", space)
        assert done.wait() == 0
    assert "2 of 2 trials are known already" in done.stdout.read()
    assert len(list((tmp_path / "s").glob("*/trials/*/trainings.txt"))) == 2


def test_a_second_search_in_the_same_folder_is_refused_at_once(tmp_path, write):
    first = run(tmp_path / "s", write(), FAKE_SECONDS="1")
    while not list((tmp_path / "s").glob("*/trials/*/trainings.txt")):
        assert first.poll() is None
        time.sleep(0.05)
    second = run(tmp_path / "s", write())
    assert second.wait() == 2 and "searches in" in second.stdout.read()
    first.terminate()
    assert first.wait() == 130
    assert "error: interrupted; the same command goes on" in first.stdout.read()


class Cluster(LocalExecutor):
    """Keeps what it was given until it is told to forget it, as a cluster does for a search that was killed."""

    def __init__(self, *, killed_after=None):
        super().__init__([Slot("a job", {})])
        self.kept, self.asked, self._killed_after = {}, [], killed_after

    def find(self, run_path):
        self.asked.append(run_path.name)
        if self.asked.count(run_path.name) == 1:
            raise Busy("may be in the queue: the controller does not answer")
        found = self.kept.get(run_path)
        if found is not None:
            found.waiting = []  # it has ended meanwhile
            super().submit(found, self.slots[0])
        return found

    def submit(self, work, slot):
        (run_path,) = work.run_paths
        assert run_path not in self.kept
        self.kept[run_path] = work
        work.news.append(f"job {len(self.kept)}")
        super().submit(work, slot)

    def wait(self, timeout_s):
        ended = super().wait(timeout_s)
        if ended and len(self.kept) == self._killed_after:
            raise KeyboardInterrupt
        return ended

    def forget(self, work, run_path):
        self.kept.pop(run_path)


def test_a_search_finds_again_what_it_had_given_to_a_cluster(tmp_path, write, monkeypatch):
    monkeypatch.setattr(loop, "LOOK_S", 0.05)
    whole = search(tmp_path / "whole", write(trials=3))
    killed, lines = Cluster(killed_after=1), []
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "s", write(trials=3), executor=killed)
    (left,) = killed.kept  # the training of trial 0 has ended, and nobody has written down what came of it
    again = Cluster()
    again.kept = {left: killed.kept[left]}
    again.kept[left].locks = []
    assert search(tmp_path / "s", write(trials=3), executor=again, say=lines.append) == whole
    assert (left / "trainings.txt").read_text() == "started\n" and not again.kept
    assert "trial 1: job 1" in lines
    waiting = "waiting: trial 2 may be in the queue: the controller does not answer"
    assert lines.count(waiting) == 1 and again.asked.count(left.name) == 2


@pytest.mark.slow
def test_a_search_on_slurm_makes_the_trials_of_one_here(tmp_path, write, monkeypatch):
    if reason := slurm.missing():
        pytest.skip(reason)
    here = search(tmp_path / "here", write(trials=4, trials_at_once=2))
    with slurm.running(tmp_path / "slurm") as cluster:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        words = ["executor=slurm", "executor.gpus=0", "executor.time_minutes=5", "executor.poll_seconds=1"]
        done = run(tmp_path / "there", write(trials=4, trials_at_once=2), *words)
        said = done.communicate()[0]
    assert done.returncode == 0, said
    (folder,) = (tmp_path / "there").glob("*-s0")
    trials = json.loads((folder / "trials.json").read_text())["trials"]
    assert [(one["status"], one["values"]) for one in trials] == [(status, values) for status, values, _ in here]
    assert "job" in said and not list((folder / "slurm").glob("*.json"))


def test_a_failed_trial_is_told_and_the_others_go_on(tmp_path, write, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "adapter.rank=4")
    lines = []
    found = search(tmp_path / "s", write(), engine="grid", say=lines.append)
    failed = [status == FAILED for status, _, _ in found]
    assert 0 < sum(failed) < 8 and failed == [values["adapter.rank"] == 4 for _, values, _ in found]
    assert any("failed: loss is not finite at step 3" in line for line in lines)
    with open(tmp_path / "s" / "trials.csv") as file:
        assert [bool(row["error"]) for row in csv.DictReader(file)] == failed


def test_a_loss_that_is_not_finite_fails_its_trial_and_no_other(tmp_path, write, monkeypatch):
    monkeypatch.setenv("FAKE_NAN", "adapter.rank=4")
    found = search(tmp_path / "s", write(), engine="grid")
    assert {status for status, values, _ in found if values["adapter.rank"] == 4} == {FAILED}
    assert {status for status, values, _ in found if values["adapter.rank"] != 4} == {COMPLETE}
    entries = json.loads((tmp_path / "s" / "trials.json").read_text())["trials"]
    [failed, *_] = [entry for entry in entries if entry["status"] == FAILED]
    assert failed["error"] == "its held-out loss is not finite" and failed["evaluations"]["4"] is None
    assert search(tmp_path / "s", write(), engine="grid") == found  # its journal is read again


def test_an_accuracy_that_is_not_finite_is_no_good_one(tmp_path, monkeypatch):
    """NLU's losses are 1 − accuracy: one that is missing must not become −∞."""
    run = types.SimpleNamespace(kind="nlu", nlu=types.SimpleNamespace(task="sst2"), run_path=tmp_path)
    lines = [{"step": step, "max_steps": 2, "eval_heldout_accuracy": value} for step, value in ((1, 0.75), (2, None))]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert TrialRuns.evaluations(None, run) == [(1, 0.25, False), (2, math.inf, True)]


def test_nomad_goes_on_after_a_failed_trial_but_cannot_start_from_one(tmp_path, write, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "adapter.rank=16")
    found = search(tmp_path / "s", write(), engine="nomad")
    assert len(found) == 8 and {status for status, _, _ in found} >= {COMPLETE}
    monkeypatch.setenv("FAKE_FAIL", "adapter.rank=8")
    with pytest.raises(UserError, match="NOMAD cannot start from a trial that fails .loss is not finite"):
        search(tmp_path / "t", write(), engine="nomad")


def test_a_search_whose_first_trials_all_fail_ends(tmp_path, write, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "seed=42")
    with pytest.raises(UserError, match="the first 5 trials have failed, the last one with: loss is not finite"):
        search(tmp_path / "s", write(), engine="random")


def test_what_nomad_rounds_stays_in_the_space(write):
    rate = {"float": [1.23456123e-4, 9.8765478e-4], "log": True, "start": 5e-4}
    space = load_space(str(write(parameters={"trainer.learning_rate": rate})))
    ends = [nomad.decoded([place], space)["trainer.learning_rate"] for place in (0, nomad.STEPS)]
    assert ends == [1.23456123e-4, 9.8765478e-4]
    within = nomad.decoded([1], space)["trainer.learning_rate"]
    assert within == float(f"{within:.6g}") and 1.23456123e-4 < within < 9.8765478e-4


def test_a_searched_method_is_not_typed(write):
    path = write(parameters=PARAMETERS | {"method": {"choice": ["lora", "pissa"], "start": "lora"}})
    with pytest.raises(UserError, match="method=lora: the search chooses method: leave it out"):
        check_runs(load_space(str(path)), "toy", method="lora", words=[], kind="nlg")


def test_an_engine_that_has_no_further_point_says_so(tmp_path, write):
    done = run(tmp_path / "s", write(trials=30, parameters={"adapter.rank": {"choice": [4, 8, 16]}}), "engine=nomad")
    text = done.communicate()[0]
    assert done.returncode == 0 and "nomad had no further trial to propose after 3: " in text


def test_a_folder_of_another_search_is_refused(tmp_path, write):
    search(tmp_path / "s", write(trials=2))
    with pytest.raises(UserError, match=r"holds another search .space.trials 2 → 3"):
        search(tmp_path / "s", write(trials=3))
    file = tmp_path / "s" / "search.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"optuna": "4.0.0"}))
    with pytest.raises(UserError, match="begun with Optuna 4.0.0"):
        search(tmp_path / "s", write(trials=2))
    file.write_text("{")
    with pytest.raises(UserError, match="search.json is damaged"):
        search(tmp_path / "s", write(trials=2))
    file.unlink()
    with pytest.raises(UserError, match="has a journal.log and no search.json"):
        search(tmp_path / "s", write(trials=2))


def test_the_journal_is_a_study_that_optuna_reads(tmp_path, write):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    found = search(tmp_path / "s", write(trials=3))
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "s" / "journal.log")))
    study = optuna.load_study(study_name="search", storage=storage)
    assert [trial.params for trial in study.trials] == [values for _, values, _ in found]
    assert study.best_value == pytest.approx(min(loss for _, _, loss in found))


def test_outcomes_are_told_in_order(tmp_path, write):
    journal = Journal(tmp_path / "s", load_space(str(write())), {})
    for value in (4, 8):
        journal.propose({"trainer.learning_rate": 1e-3, "adapter.rank": value, "adapter.dropout": 0.0}, {})
    with pytest.raises(AssertionError, match="in order"):
        journal.tell(1, Outcome(COMPLETE, 1.0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toy"], "a config and a search space are needed, found toy"),
        (["toy", "nosuch"], "no such search space: nosuch"),
        (["nosuch", "toy"], "no such config"),
        (["toy", "toy", "trials=many"], "trials=many: a whole number"),
        (["toy", "toy", "engine=tpe,tpe"], "named twice"),
        (["toy", "toy", "engine=bayes"], "engine=bayes is unknown"),
        (["toy", "toy", "seeds=1,a"], "seeds=1,a: whole numbers are needed"),
        (["toy", "toy", "method=lola"], "lola"),
        (["toy", "toy", "workers=0"], "workers=0"),
        (["toy", "toy", "trainer.learning_rate=1"], "the search chooses trainer.learning_rate"),
        (["toy", "toy", "output=/proc/x"], "output"),
        (["toy", "toy", "seed=7"], "seed=7: a search sets it for each trial: give seeds="),
        (["toy", "toy", "output_dir=x"], "output_dir=x: a search sets it for each trial: give output=DIR"),
        (["toy", "toy", "overwrite=true"], "overwrite=true: a search sets it for each trial"),
        (["toy", "toy", "executor=slrm"], "executor=slrm: no such file.*nearest: slurm"),
        (["toy", "toy", "executor=slurm", "executor.partiton=x"], "unknown key partiton .nearest: partition"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_line(words, message, monkeypatch, tmp_path):
    from ba_lora.experiments.search import main as command

    monkeypatch.setattr(sys, "argv", ["search", *words, "--dry-run"])
    with pytest.raises(UserError, match=message) as error:
        command.main()
    assert "\n" not in str(error.value)


def test_a_missing_package_is_one_line(monkeypatch, write):
    monkeypatch.setitem(sys.modules, "optuna", None)
    from ba_lora.experiments.search.journal import import_optuna

    with pytest.raises(UserError, match="needs Optuna, which is not installed: run .venv/bin/pip install"):
        import_optuna()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="engine nomad needs PyNomadBBO"):
        open_proposer(load_space(str(write()), typed={"engine": "nomad"}))


def test_the_page_tells_what_the_committed_comparison_found():
    facts = json.loads((ROOT / "results" / "search_toy" / "engines.json").read_text())
    page = (ROOT / "docs" / "search.md").read_text()
    for engine, one in facts["engines"].items():
        each = ", ".join(f"{value:.4f}" for value in one["best"])
        assert f"| {engine} | {one['mean_best']:.4f} ± {one['sd_best']:.4f} | {each} |" in page
    assert all(entry["interval"][0] < 0 < entry["interval"][1] for entry in facts["differences"])  # no engine wins
    for engine, one in facts["engines"].items():
        for seed, best in zip(one["search_seeds"], one["best"], strict=True):
            with open(ROOT / "results" / "search_toy" / f"{engine}-s{seed}" / "trials.csv") as file:
                assert min(float(row["heldout_loss"]) for row in csv.DictReader(file)) == best


def test_a_warm_stage_writes_its_log_anew_or_goes_on_with_it(tmp_path):
    from ba_lora.experiments.executors.warm import WarmExecutor
    from ba_lora.experiments.stages import Call, Stage

    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text("import sys\nprint(*sys.argv[1:])\n")
    executor = WarmExecutor([Slot("CPU", {})])
    executor._context.set_forkserver_preload([])  # no torch is needed here
    for words, append in (("old",), False), (("first",), False), (("second",), True):
        stage = Stage("training", Call(str(script), settings=words, launch=(sys.executable,)), (tmp_path / "run",))
        assert executor.start_process(stage, executor.slots[0], log, [], append=append).wait(60) == 0
    assert log.read_text() == "first\nsecond\n"
    stage = Stage("scoring", Call("json.tool", {"help": None}, ("--help",)), (tmp_path / "run",))
    assert executor.start_process(stage, executor.slots[0], log, []).wait(60) == 0
    assert "--no-ensure-ascii" in log.read_text()  # a module, with its own words


def test_kill_9_leaves_no_forked_stage_behind(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, pathlib, sys, time\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ntime.sleep(600)\n"
    )
    program = f"""
import sys
from pathlib import Path
from ba_lora.experiments.executors.base import Slot
from ba_lora.experiments.executors.warm import WarmExecutor
from ba_lora.experiments.stages import Call, Stage
folder = Path({str(tmp_path)!r})
if __name__ == "__main__":
    executor = WarmExecutor([Slot("CPU", {{}})])
    executor._context.set_forkserver_preload([])
    call = Call(str(folder / "script.py"), settings=(str(folder / "pid"),), launch=(sys.executable,))
    executor.start_process(Stage("training", call, (folder / "run",)), executor.slots[0], folder / "log", []).wait()
"""
    (tmp_path / "grid.py").write_text(program)
    grid = subprocess.Popen([sys.executable, tmp_path / "grid.py"], env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert grid.poll() is None
        time.sleep(0.01)
    grid.kill()
    grid.wait()
    while group_lives(int((tmp_path / "pid").read_text())):
        time.sleep(0.01)


def test_no_gpu_is_forked():
    from ba_lora.experiments.executors.warm import WarmExecutor

    with pytest.raises(UserError, match="warm is for the CPU"):
        WarmExecutor([Slot("GPU 0", {}, (Path("gpu.lock"),), num_gpus=1)])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tpe", "nomad"])
def test_real_trainings_killed_and_resumed_have_the_values_of_those_that_were_not(tmp_path, engine):
    """The space of configs/search/toy.yaml, forked from a warm process."""

    def start(name):
        words = ["toy", "toy", "trials=3", f"engine={engine}", "workers=1", f"output={tmp_path / name}"]
        command = [sys.executable, "-m", "ba_lora.experiments.search.main", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    whole = start("whole")
    assert whole.wait() == 0, whole.stdout.read()
    killed = start("killed")
    while not (tmp_path / "killed" / f"{engine}-s0" / "trials" / "t0001-s42" / "config.yaml").is_file():
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    resumed = start("killed")
    assert resumed.wait() == 0, resumed.stdout.read()
    one, other = (
        json.loads((tmp_path / name / f"{engine}-s0" / "trials.json").read_text())["trials"]
        for name in ("whole", "killed")
    )
    assert [(trial["values"], trial["value"]) for trial in one] == [
        (trial["values"], trial["value"]) for trial in other
    ]


@pytest.mark.slow
def test_accuracy_on_held_out_rows_is_generated_and_scored(tmp_path):
    """A real training, which is then asked for the answers of rows that the toy's own generator has made."""
    from data.toy import generate_problems

    rows = generate_problems(num_rows=12, seed=9, split="finetune")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    space = {
        "title": "accuracy",
        "engine": "random",
        "trials": 1,
        "objective": "heldout_accuracy",
        "overrides": ["data.num_rows=960", "trainer.num_train_epochs=1", "trainer.save_strategy=no", "eval.engine=hf"],
        "parameters": {"trainer.learning_rate": {"float": [1e-3, 1e-2], "start": 5e-3}},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    words = ["toy", str(tmp_path / "space.yaml"), "method=lora", f"eval.data.heldout={tmp_path / 'rows.jsonl'}"]
    command = [sys.executable, "-m", "ba_lora.experiments.search.main", *words, f"output={tmp_path / 's'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (trial,) = json.loads((tmp_path / "s" / "random-s0" / "trials.json").read_text())["trials"]
    score = json.loads((tmp_path / "s" / "random-s0" / "trials" / "t0000-s42" / "scores" / "heldout.json").read_text())
    assert trial["value"] == pytest.approx(score["metrics"]["strict"]) and score["n"] == 12
    assert trial["value"] > 0  # it has learnt the answer's form and more
