"""The grid's logic on fast fake stages: nothing is lost, nothing is done twice, everything is told."""

import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import time
import types

import pytest

from ba_lora.errors import INCOMPLETE, UserError
from ba_lora.experiments import grid_runs
from ba_lora.experiments import state as grid_state
from ba_lora.experiments.evaluation_state import STATE_FILE
from ba_lora.experiments.executors.base import Busy, Slot, StageQueue
from ba_lora.experiments.executors.local import LocalExecutor
from ba_lora.experiments.grid_progress import Running
from ba_lora.experiments.grid_runs import Grid
from ba_lora.experiments.options import read_grid_options, rows_for_gpus, select_rows
from ba_lora.experiments.plan import Checks, dry_run, plan_runs
from ba_lora.experiments.preparation import GRID_MODULE, prepare, prepare_words
from ba_lora.experiments.spec import Spec
from ba_lora.experiments.stages import Call, Stage, evaluation_stages
from ba_lora.experiments.state import inspect, read_failure
from ba_lora.experiments.tables import load_table
from ba_lora.glue import HUB_REVISION
from ba_lora.locks import try_lock, work_lock_path
from eval import nlu
from eval.tasks.glue import VERSION
from tests.support.signals import slow_to_end
from tests.support.tiny_nlu import scored_run
from tests.workers import fake_grid


@pytest.fixture
def folder(grid_folder):
    return grid_folder


def counted(folder):
    return collections.Counter(fake_grid.ledger(folder))


def paths_of(table):
    return [spec.config.run_path for spec in table.specs()]


def check_complete(table):
    for spec in table.specs():
        result = json.loads(spec.config.result_path.read_text())
        number = sum(map(ord, spec.config.run_path.name)) % 100 / 100
        assert result["status"] == "ok" and result["evaluation"]["toy"]["metrics"]["strict"] == number
        assert result["training"]["seconds"] == number and result["seed"] == spec.config.seed


def test_every_run_once_and_generation_together(folder):
    table = fake_grid.table(folder)
    lines = []
    grid = fake_grid.run(table, say=lines.append)
    assert len(grid.done) == 6 and not grid.failed
    check_complete(table)
    assert set(counted(folder).values()) == {1} and len(counted(folder)) == 6 * 3
    assert any(line.startswith("trained: ") and "of 6 done" in line for line in lines)
    logs = list((folder / "outputs" / ".grid" / "logs").glob("*.generate.log"))
    assert len(logs) < 6  # starts of the engine


def test_what_begins_and_what_runs_long_is_told(folder, monkeypatch):
    monkeypatch.setattr("ba_lora.experiments.grid_runs.POLL_S", 0.05)
    monkeypatch.setattr("ba_lora.experiments.grid_runs.QUIET_S", 0.2)
    monkeypatch.setenv("FAKE_SECONDS", "0.6")
    table = fake_grid.table(folder, seeds=[1])
    lines, started = [], time.monotonic()
    fake_grid.run(table, say=lines.append, workers=1)
    first, second = (path.name for path in paths_of(table))
    logs = folder / "outputs" / ".grid" / "logs"
    began = [line for line in lines if " on worker 0 " in line]
    assert began == [
        f"training: {first} on worker 0 (log: {logs}/{first}.train.log)   [0 of 2 done]",
        f"training: {second} on worker 0 (log: {logs}/{second}.train.log)   "
        "[0 of 2 done, about 0 min of training left]",
        f"evaluating: {first}, {second} on worker 0 (log: {logs}/{first}.generate.log)   "
        "[0 of 2 done, about 0 min of training left]",
    ]
    running = [line for line in lines if ", for 0 min: " in line]
    assert f"training: {first}, for 0 min: train:  50%" in running
    assert f"evaluating: {first} and 1 more, for 0 min: generate:  50%" in running
    assert running[-1] == f"evaluating: {first} and 1 more, for 0 min: score:  50%"  # the log of the stage that runs
    assert len(running) <= (time.monotonic() - started) / 0.2


def test_what_is_done_is_skipped(folder):
    table = fake_grid.table(folder)
    fake_grid.run(table)
    before = counted(folder)
    fake_grid.run(fake_grid.table(folder))
    assert counted(folder) == before
    more = fake_grid.table(folder, seeds=[1, 2, 3, 4])
    fake_grid.run(more)
    assert sum(counted(folder).values()) == sum(before.values()) + 2 * 3  # the two runs of the new seed


@pytest.mark.parametrize("text", [None, "", '{"half', "[]", '{"status": "failed", "finished_at": "2020-01-01"}'])
def test_a_result_that_is_lost_or_no_result_of_the_run_is_written_again_without_a_stage(folder, text):
    table = fake_grid.table(folder, seeds=[1])
    fake_grid.run(table)
    before = counted(folder)
    path = table.specs()[0].config.result_path
    path.unlink() if text is None else path.write_text(text)
    state = inspect(table.specs()[0], fake_grid.GRADERS)
    assert state.status == "unfinished" and state.record and state.reason
    fake_grid.run(table)
    check_complete(table)
    assert counted(folder) == before


def test_another_grader_means_scoring_alone(folder):
    table = fake_grid.table(folder)
    fake_grid.run(table)
    lines = []
    one = table.specs()[0].config
    score = one.run_path / "scores" / "toy.json"
    score.write_text(json.dumps(json.loads(score.read_text()) | {"version": "0"}))  # by an older grader than GRADERS'
    state = inspect(table.specs()[0], fake_grid.GRADERS)
    assert state.status == "stale" and "the grader is at version 1 now" in state.reason and not state.train
    before = counted(folder)
    fake_grid.run(table, say=lines.append)
    redone = counted(folder) - before
    assert redone[f"score {one.run_path.name}"] == 1 and not any(line.startswith(("gen", "tr")) for line in redone)
    assert any(line.startswith(f"stale: {one.run_path.name}: toy: graded by version 0") for line in lines)


@pytest.mark.parametrize("text", ["", "{}"])
def test_a_damaged_state_of_one_run_is_made_again(folder, text):
    table = fake_grid.table(folder, seeds=[1])
    fake_grid.run(table)
    before, lines = counted(folder), []
    run_path = paths_of(table)[0]
    (run_path / STATE_FILE).write_text(text)
    grid = fake_grid.run(table, say=lines.append)
    assert len(grid.done) == 2 and f"stale: {run_path.name}: evaluation.json cannot be read" in lines
    assert counted(folder) - before == {f"generate {run_path.name}": 1, f"score {run_path.name}": 1}


def test_another_evaluation_generates_again_but_trains_nothing(folder):
    fake_grid.run(fake_grid.table(folder))
    before = counted(folder)
    lines = []
    changed = fake_grid.table(folder, overrides=["eval.limit=5"])
    fake_grid.run(changed, say=lines.append)
    redone = counted(folder) - before
    assert len([line for line in redone if line.startswith("generate")]) == 6
    assert not [line for line in redone if line.startswith("train")]
    assert any("evaluated with another eval.limit" in line for line in lines)


@pytest.mark.parametrize(
    ("kind", "words", "revision", "reason"),
    [
        ("nlg", ["data.name=metamathqa"], "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18", None),
        (
            "nlg",
            ["data.name=metamathqa"],
            "0" * 40,
            "trained on revision 0000000000 of metamathqa, pinned is aa4f34d3d2",
        ),
        ("nlu", ["task=rte"], HUB_REVISION, None),
        ("nlu", ["task=rte", "data.revision=main"], "ab" * 20, None),  # the commit that the branch stood for
        (
            "nlu",
            ["task=rte"],
            "0" * 40,
            f"trained on revision 0000000000 of nyu-mll/glue, pinned is {HUB_REVISION[:10]}",
        ),
    ],
)
def test_training_data_of_another_revision_are_stale(folder, kind, words, revision, reason):
    base = {"nlg": "toy", "nlu": "minilm"}[kind]
    words = [*words, f"output_dir={folder}/run", "export.merged=false", "eval.tasks=[]"]
    spec = Spec.resolve(f"configs/{kind}/{base}.yaml", "lora", words, kind=kind)
    (folder / "run" / "adapter").mkdir(parents=True)
    (folder / "run" / "adapter" / "adapter_model.safetensors").touch()
    (folder / "run" / "train.json").write_text(json.dumps({"status": "ok", "data": {"revision": revision}}))
    state = inspect(spec, {})
    if reason is None:
        assert state.status == "unfinished" and not state.train  # but for its result file
    else:
        assert (state.status, state.reason, state.train, state.overwrite) == ("stale", reason, True, True)


@pytest.mark.parametrize("tasks", ["", "hans"])
def test_what_training_scored_goes_stale_with_the_graders_version(folder, tasks):
    """An NLU run's own dev sets are scored from the predictions that training kept: nothing is trained again."""
    words = ["task=rte", f"output_dir={folder}/run", "export.merged=false", f"eval.tasks=[{tasks}]"]
    spec = Spec.resolve("configs/nlu/minilm.yaml", "lora", words, kind="nlu")
    scored_run(folder / "run", *words)
    if tasks:
        (folder / "run" / "scores" / "hans.json").write_text("{}")
        (folder / "run" / STATE_FILE).write_text(json.dumps(grid_state.evaluation_state(spec.config)))
    graders = {"rte": {"version": VERSION, "hub": None}}
    state = inspect(spec, graders)
    assert (state.status, state.reason) == ("unfinished", "no result file")
    score = json.loads((folder / "run" / "scores" / "rte.json").read_text())
    (folder / "run" / "scores" / "rte.json").write_text(json.dumps(score | {"version": "0"}))
    state = inspect(spec, graders)
    assert (state.status, state.train, state.regrade) == ("stale", False, True)
    assert state.reason == f"rte: graded by version 0, the grader is at version {VERSION} now"
    [stage] = evaluation_stages([spec.config], generate=False)
    assert stage.call.command[1:] == ["-m", "eval.nlu", "--model", f"{folder}/run", "--task", "rte", *tasks.split()]
    assert len(evaluation_stages([spec.config])) == bool(tasks)
    if not tasks:
        nlu.main(stage.call.words)
        assert inspect(spec, graders).reason == "no result file"


def test_a_failure_is_shown_and_retried_on_request(folder):
    table = fake_grid.table(folder)
    bad = table.specs()[0].config.run_path
    (folder / "fail").write_text(f"train {bad.name}\n")
    grid = fake_grid.run(table)
    assert len(grid.done) == 5 and grid.failed == {bad: f"train: {bad.name} is broken: fix it"}
    (folder / "fail").unlink()
    lines = []
    again = fake_grid.run(table, say=lines.append)
    assert set(again.failed) == {bad} and f"train {bad.name}" not in counted(folder)
    assert any("is broken: fix it" in line and "retry=true" in line for line in lines)
    assert "failed " in "\n".join(dry_run(table, plan_runs(table, Checks(fake_grid.GRADERS))))
    assert not fake_grid.run(table, retry=True).failed
    check_complete(table)


def test_one_bad_run_does_not_spoil_the_others_it_was_served_with(folder):
    table = fake_grid.table(folder)
    bad = table.specs()[1].config.run_path
    (folder / "fail").write_text(f"generate {bad.name}\n")
    grid = fake_grid.run(table, workers=1)
    assert set(grid.failed) == {bad} and len(grid.done) == 5
    assert grid.failed[bad].startswith("generate: ")


@pytest.mark.parametrize("doing", ["inspect", "evaluation_stages"])
def test_what_is_wrong_with_one_run_fails_that_run_alone(folder, monkeypatch, doing):
    """Nothing of it is left behind that would keep it from being done once it is fixed."""
    table = fake_grid.table(folder, seeds=[1])
    bad, good = paths_of(table)
    real = getattr(grid_runs, doing)

    def raising(asked, *words, **settings):
        spec = asked if doing == "inspect" else asked[0]
        if bad in (getattr(spec, "run_path", None), getattr(getattr(spec, "config", None), "run_path", None)):
            raise UserError("its data are gone: bring them back")
        return real(asked, *words, **settings)

    with monkeypatch.context() as broken:
        broken.setattr(grid_runs, doing, raising)
        lines = []
        filled = fake_grid.run(table, workers=2, say=lines.append)
    assert filled.failed == {bad: "its data are gone: bring them back"} and filled.done == {good}
    assert any(line.startswith(f"failed: {bad.name}: its data are gone: bring them back ") for line in lines)
    assert len(fake_grid.run(table).done) == 2


def test_one_failed_scorer_leaves_the_runs_other_scores(folder):
    """Also those after it; a score of the failed task from before, of other completions, is taken away."""
    columns = {task: {"task": task, "metric": "strict"} for task in ("gsm8k", "toy")}
    table = fake_grid.table(folder, seeds=[1], columns=columns)
    fake_grid.run(table)
    changed = fake_grid.table(folder, seeds=[1], columns=columns, overrides=["eval.limit=5"])
    bad, good = changed.specs()
    (folder / "fail").write_text(f"score-gsm8k {bad.config.run_path.name}\n")
    before, name = counted(folder), bad.config.run_path.name
    filled = fake_grid.run(changed, workers=1)
    error = f"{name} is broken: fix it"
    assert filled.failed == {bad.config.run_path: f"score gsm8k: {error}"} and filled.done == {good.config.run_path}
    assert (counted(folder) - before)[f"generate {name}"] == 1  # whose fault it was is known
    record = json.loads(grid_state.failure_path(bad.config.run_path).read_text())
    assert (record["stage"], record["error"], record["tasks"]) == ("score gsm8k", error, {"gsm8k": error})
    result = json.loads(bad.config.result_path.read_text())
    assert list(result["evaluation"]) == ["toy"] and result["config"]["eval"]["limit"] == 5
    toy = fake_grid.table(folder, seeds=[1], columns={"toy": columns["toy"]}, overrides=["eval.limit=5"])
    grid_state.failure_path(bad.config.run_path).unlink()
    assert [inspect(spec, fake_grid.GRADERS).status for spec in toy.specs()] == ["done", "done"]
    assert inspect(bad, fake_grid.GRADERS).reason == "no score of gsm8k"
    (folder / "fail").unlink()
    assert len(fake_grid.run(changed).done) == 2


@pytest.mark.parametrize("kind", ["train", "generate"])
def test_a_failure_of_the_whole_run_names_no_task(folder, kind):
    table = fake_grid.table(folder, seeds=[1])
    bad = table.specs()[0].config
    (folder / "fail").write_text(f"{kind} {bad.run_path.name}\n")
    fake_grid.run(table)
    assert "tasks" not in json.loads(grid_state.failure_path(bad.run_path).read_text())
    assert not (bad.run_path / "scores").exists()


def test_a_run_that_is_held_is_waited_for(folder):
    """Another process has one run; the grid does the others, waits, and finds it done."""
    table = fake_grid.table(folder)
    path = paths_of(table)[0]
    holding = os.fork()
    if holding == 0:
        lock = try_lock(work_lock_path(path))
        (folder / "held").touch()
        signal.pause()
        os._exit(lock is None)
    while not (folder / "held").exists():
        time.sleep(0.02)
    pid = fake_grid.fork(table)
    while len(done := [line for line in fake_grid.ledger(folder) if line.startswith("score")]) < 5:
        time.sleep(0.05)
    time.sleep(0.3)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # it waits
    assert f"train {path.name}" not in fake_grid.ledger(folder) and len(done) == 5
    os.kill(holding, signal.SIGKILL)
    os.waitpid(holding, 0)
    assert os.waitpid(pid, 0)[1] == 0
    check_complete(table)


def test_two_grids_at_once_share_the_work(folder):
    table = fake_grid.table(folder, seeds=list(range(1, 9)))
    pids = [fake_grid.fork(table) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    check_complete(table)
    assert set(counted(folder).values()) == {1}


def test_ctrl_c_ends_the_stages_and_keeps_what_is_done(folder):
    table = fake_grid.table(folder)
    held = paths_of(table)[0]
    (folder / "hold").write_text(f"train {held.name}\n")
    pid = fake_grid.fork(table)
    while not (fake_grid.ledger(folder) and (held / "config.yaml").is_file()):
        time.sleep(0.02)
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    running = [int(file.name) for file in (folder / "pids").iterdir()]
    assert running and not any(alive(number) for number in running)
    trained = [line for line in fake_grid.ledger(folder) if line.startswith("train")]
    assert trained and f"train {held.name}" not in trained
    (folder / "hold").unlink()
    fake_grid.run(table)
    check_complete(table)
    assert all(counted(folder)[line] == 1 for line in trained)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_at_random_instants(folder, number):
    """kill -9 of the grid alone (its stages live on) or of everything: the same command keeps all that was finished."""
    table = fake_grid.table(folder)
    started = time.monotonic()
    assert os.waitpid(fake_grid.fork(table), 0)[1] == 0
    whole_s = time.monotonic() - started
    generator = random.Random(number)
    interrupted = 0
    for attempt in range(number):
        place = folder / f"attempt{attempt}"
        fake_grid.use(place)
        table = fake_grid.table(place)
        pid = fake_grid.fork(table)
        time.sleep(generator.uniform(0.02, whole_s))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if attempt % 2:
            for file in (place / "pids").glob("*") if (place / "pids").exists() else []:
                os.kill(int(file.name), signal.SIGKILL) if alive(int(file.name)) else None
        files = [
            file
            for path in paths_of(table)
            for file in (path / "train.json", path / "evaluation.json")
            if file.is_file()
        ]
        before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
        interrupted += len(before) < 12
        grid = fake_grid.run(table)
        assert len(grid.done) == 6 and not grid.failed
        check_complete(table)
        for file, (written, content) in before.items():
            assert file.stat().st_mtime_ns == written and file.read_bytes() == content, file
        trained = {f"train {file.parent.name}" for file in before if file.name == "train.json"}
        evaluated = {f"generate {file.parent.name}" for file in before if file.name == "evaluation.json"}
        ended = counted(place)
        # a stage that was killed between its last file and its line in the ledger has none
        assert all(ended[line] <= 1 for line in trained | evaluated)
        assert len(list((place / "results").glob("*.json"))) == 6
        leftovers = [file for file in (place / "results").iterdir() if file.name.endswith(".tmp")]
        assert not leftovers
    assert interrupted >= number // 2


def test_the_words_of_the_command_line():
    words = ["retry=true", "seeds=[1,2]", "workers=3", "only=lora,pissa", "output=there", "allow=engine"]
    options, overrides = read_grid_options([*words, "data.num_rows=5"])
    assert options.report == ("output=there", "allow=engine")
    assert options.retry and options.seeds == (1, 2) and options.workers == 3 and options.only == ("lora", "pissa")
    assert overrides == ["data.num_rows=5"]
    for word, message in {
        "workers=0": "workers=0: a whole number from 1 to 1024 is needed",
        "retry=often": "retry=often: true or false is needed",
        "seeds=[a]": "whole numbers",
        "only=": "only= has no value: give one, or leave it out",
        "workers=": "workers= has no value",
        "output=": "output= has no value",
        "toy": "cannot read 'toy'",
    }.items():
        with pytest.raises(UserError, match=message):
            read_grid_options([word])


def test_a_run_that_its_executor_cannot_tell_of_is_asked_for_again(folder):
    class Silent(LocalExecutor):
        asked = 0

        def find(self, run_path):
            self.asked += 1
            if self.asked == 1:  # the first of the runs, once
                raise Busy("the controller does not answer")
            return None

    filled = fake_grid.run(fake_grid.table(folder, seeds=[1]), executor=Silent([Slot("worker", {})]))
    assert len(filled.done) == 2 and not filled.failed


def test_what_a_table_needs_first_is_told_how_and_where(folder):
    words = ["retry=true", "workers=3", "executor=slurm", "executor.partition=gpu", "cancel=true", "seeds=1"]
    options, _ = read_grid_options(words)
    handed_on = ["workers=3", "retry=true", "cancel=true", "executor=slurm", "executor.partition=gpu"]
    assert prepare_words((GRID_MODULE, "tuning"), options) == [GRID_MODULE, "tuning", *handed_on]
    with pytest.raises(UserError, match="executor=slurm: the table needs python -m data.lab rule=0, which runs"):
        prepare_words(("data.lab", "rule=0"), options)
    for executor in ("local", "warm"):
        options, _ = read_grid_options(["workers=3", "retry=true", f"executor={executor}"])
        assert prepare_words(("data.lab", "rule=0"), options) == ["data.lab", "rule=0", "workers=3"]


def test_a_table_that_comes_first_may_lack_its_page_and_nothing_else(monkeypatch):
    def ends_with(status):
        return ["timeit", "-n", "1", "-r", "1", f"import os; os._exit({status})"]  # a module that runs a line of code

    for module, status, goes_on in (
        ("timeit", INCOMPLETE, True), ("timeit", 1, False), ("timeit", 2, False), (GRID_MODULE, INCOMPLETE, False)
    ):  # fmt: skip
        monkeypatch.setattr("ba_lora.experiments.preparation.GRID_MODULE", module)
        with contextlib.nullcontext() if goes_on else pytest.raises(UserError, match=f"exit status {status}"):
            prepare(ends_with(status))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_what_a_table_needs_first_and_lets_it_end(tmp_path, number):
    """A shell's background job ignores SIGINT, and so does all that it starts: SIGTERM ends it."""
    before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(number, signal.default_int_handler)
        code, ended = slow_to_end(tmp_path, number)
        with pytest.raises(KeyboardInterrupt):
            prepare(["timeit", "-n", "1", "-r", "1", code])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert ended.exists()


def test_what_another_grid_evaluated_for_something_else_is_not_this_tables(folder):
    """Found again on a cluster: its tasks or settings may be others."""
    table = fake_grid.table(folder, seeds=[1])
    grid = fake_grid.run(table)
    spec = table.specs()[0]
    path = spec.config.run_path
    work = types.SimpleNamespace(
        doing="evaluating", failures={}, states={}, seconds=1.0, run_paths=[path], goes_on=lambda path: False
    )
    for is_there in (False, True):
        grid.done.clear()
        score = path / "scores" / "toy.json"
        text = score.read_text()
        if not is_there:
            score.unlink()
        grid._record(Running(work, [spec], is_found=True))
        assert (path in grid.done) == is_there
        score.write_text(text)


@pytest.mark.parametrize("retry", [False, True])
def test_what_failed_on_a_cluster_before_this_command_is_tried_again_where_told(folder, retry):
    """As a job that was cancelled while no grid watched it."""
    table = fake_grid.table(folder, seeds=[1])
    grid = fake_grid.run(table, retry=retry)
    spec = table.specs()[0]
    path = spec.config.run_path
    grid.done.clear()
    work = StageQueue([Stage("train", Call("train"), (path,))], folder)
    work.fail(work.stages[0], 1, folder / "log", "its job 7 ended without a result: CANCELLED")
    grid._record(Running(work, [spec], is_found=True))
    assert (path in grid.failed) != retry and "CANCELLED" in read_failure(path)["error"]
    grid._record(Running(work, [spec]))  # of this command
    assert path in grid.failed


def test_an_option_with_a_typing_error_is_no_key_of_the_table():
    with pytest.raises(UserError, match=r"\Aunknown key workres .nearest: workers.\Z"):
        read_grid_options(["workres=2"])
    assert read_grid_options(["seed=3", "data.num_rows=5"])[1] == ["seed=3", "data.num_rows=5"]


def test_rows_can_be_chosen(folder):
    block = {"bases": ["toy"], "methods": ["lora", "pissa"], "settings": {"rank=2": ["adapter.rank=2"], "rank=4": []}}
    table = fake_grid.table(folder, rows=[block])
    assert {(row.method, row.setting) for row in select_rows(table, ["rank=4"]).rows} == {
        ("lora", "rank=4"),
        ("pissa", "rank=4"),
    }
    chosen = select_rows(table, ["pissa", "rank=4"])
    assert len(chosen.specs()) == 3 and [row.method for row in chosen.rows] == ["pissa"]
    assert len(select_rows(table, ["toy", "pissa", "lora"]).rows) == 4
    with pytest.raises(UserError, match="only=rank=5 names no row .nearest: rank=4"):
        select_rows(table, ["lora", "rank=5"])


def test_a_missing_base_is_told_in_one_line(folder):
    with pytest.raises(UserError, match="entry 1: no such config: .*llama-9.yaml"):
        fake_grid.table(folder, rows=[{"bases": ["llama-9"], "methods": ["lora"]}])


def test_a_full_disk_is_told_in_one_line(folder, tmp_path):
    place = tmp_path / "full"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (not root)")
    try:
        fake_grid.use(place)
        table = fake_grid.table(place)
        (place / "filler").write_bytes(b"")
        with open(place / "filler", "wb") as file, contextlib.suppress(OSError):
            file.write(b"x" * 2**21)
        with pytest.raises(UserError, match="no disk space left while writing"):
            fake_grid.run(table)
        (place / "filler").unlink()
        assert len(fake_grid.run(table, retry=True).done) == 6
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_the_real_table_has_real_commands(root, monkeypatch):
    monkeypatch.chdir(root)
    table = load_table(root / "configs" / "tables" / "toy.yaml", seeds=[42])
    grid = Grid(table, LocalExecutor([]), graders={})
    assert len(grid.specs) == len(table.specs()) and grid.progress() == f"0 of {len(grid.specs)} done"


def test_only_rows_that_are_set_for_so_many_gpus_are_run(folder):
    """On another number the same words would mean another effective batch."""
    block = {"bases": ["toy"], "methods": ["lora"]}
    blocks = [
        block | {"settings": {"rank=2": ["adapter.rank=2"]}},
        {"bases": ["toy"], "methods": ["full_ft"], "gpus": 8},
    ]
    table = fake_grid.table(folder, rows=blocks)
    one, gpus, left_out = rows_for_gpus(table, None)
    assert gpus == 1 and {cell.row.method for cell in one.cells} == {row.method for row in one.rows} == {"lora"}
    assert left_out == ["left out: 3 runs of full_ft: they take gpus=8"]
    eight, gpus, left_out = rows_for_gpus(table, 8)
    assert gpus == 8 and [row.method for row in eight.rows] == ["full_ft"] and len(eight.specs()) == 3
    assert left_out == ["left out: 3 runs of lora: they take gpus=1"]
    with pytest.raises(UserError, match="gpus=4: the rows of fake are set for 1 or 8 GPU"):
        rows_for_gpus(table, 4)
    assert rows_for_gpus(fake_grid.table(folder, rows=blocks[1:]), None)[1:] == (8, [])
    with pytest.raises(UserError, match="rows, entry 1: gpus: 0"):
        fake_grid.table(folder, rows=[block | {"gpus": 0}])
