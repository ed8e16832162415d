"""What a command says when it is interrupted: a line of its own that the grid finds, and never a promise it breaks."""

import runpy
import signal
import subprocess
import sys

import pytest

from ba_lora import errors
from ba_lora.experiments import state as grid_state
from ba_lora.experiments.executors.base import StageFailure
from ba_lora.experiments.stages import Call, Stage

RESUMING = {
    "train_nlg",
    "train_nlu",
    "ba_lora.experiments.pipeline",
    "ba_lora.experiments.pipeline_nlu",
    "ba_lora.experiments.grid",
    "eval.generate",
}
OTHERS = {
    "eval.chat",
    "eval.check",
    "eval.compare",
    "eval.rescore",
    "eval.score",
    "eval.nlu",
    "eval.report",
    "eval.inheritance",
    "ba_lora.runs.results_nlu",
    "data.toy",
}
GOES_ON = "the same command goes on from what is saved"


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(("resumes", "said"), [(False, "error: interrupted"), (True, f"error: interrupted; {GOES_ON}")])
def test_an_interrupted_command_says_so_below_its_progress_bar(resumes, said, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as left:
        errors.run_entry_point(interrupted, resumes=resumes)
    assert left.value.code == 130
    printed = f"step 3: 12 %{capsys.readouterr().err}"
    assert printed.splitlines() == ["step 3: 12 %", said]
    log = tmp_path / "train.log"
    log.write_text(printed + "resource_tracker: cleaned up at the end\n", encoding="utf-8")
    found = grid_state.stage_error(StageFailure(Stage("train", Call("train_nlg.py"), ()), 130, log))
    assert found == said.removeprefix("error: ")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_ends_a_command_quietly(lines, root):
    """`… | head -1`, after what it prints at once and in the middle of it."""
    text = f"from ba_lora.errors import run_entry_point; run_entry_point(lambda: print('row\\n' * {lines}))"
    command = subprocess.Popen(
        [sys.executable, "-c", text], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    command.stdout.close()
    assert (command.stderr.read(), command.wait()) == ("", 128 + signal.SIGPIPE)


def test_another_broken_pipe_is_not_taken_for_that():
    def broken():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        errors.run_entry_point(broken)


def test_words_that_may_be_left_out_are_not_called_required():
    parser = errors.CommandParser(prog="show")
    parser.add_argument("config")
    parser.add_argument("words", nargs="*", metavar="key=value")
    with pytest.raises(errors.UserError, match="required: config; see"):
        parser.parse_intermixed_args([])
    assert parser.parse_intermixed_args(["a"]).words == [] and parser.parse_intermixed_args(["a", "b"]).words == ["b"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("module", sorted(RESUMING | OTHERS))
def test_only_what_resumes_says_that_it_goes_on(module, monkeypatch):
    calls = []
    monkeypatch.setattr(errors, "check_first", lambda check: None)
    monkeypatch.setattr(errors, "run_entry_point", lambda main, *, resumes=False: calls.append(resumes))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert calls == [module in RESUMING]


IN_A_GROUP = """
import atexit, os
import torch
from ba_lora.errors import UserError, run_entry_point

class AliveAtTheEnd:
    def __del__(self, abort=os.abort):
        abort()

def main():
    torch.distributed.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=1)
    atexit.register(print, "an exit function")
    print("all done")
    {end}

kept = {kept}
run_entry_point(main)
"""


def test_a_process_of_a_group_that_succeeds_ends_so_whatever_is_still_alive(tmp_path, root):
    """As with the group's own threads: what is alive at the interpreter's tear-down can abort the process."""
    ended = _run(IN_A_GROUP.format(store=tmp_path / "store", end="", kept="AliveAtTheEnd()"), root)
    assert (ended.returncode, ended.stdout.splitlines()) == (0, ["all done", "an exit function"]), ended.stderr


def test_a_process_of_a_group_that_fails_tells_its_status(tmp_path, root):
    end = "raise UserError('no such file')"
    ended = _run(IN_A_GROUP.format(store=tmp_path / "store", end=end, kept="None"), root)
    assert (ended.returncode, ended.stdout.splitlines()) == (2, ["all done", "an exit function"]), ended.stderr
    assert "error: no such file" in ended.stderr


def _run(program, root):
    return subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=3600)
