"""Answers as logs for Inspect, read again by inspect_ai's own reader."""

import json
import sys

import pytest

from ba_lora.errors import INCOMPLETE, UserError
from ba_lora.io import write_json_atomic
from eval.page import inspect_logs
from eval.page.inspect_logs import INSTALL, write_logs
from eval.page.loose import find_runs
from eval.report.__main__ import main as report
from tests.support.page_world import HOSTILE, ITEMS


def test_without_inspect_the_line_says_how_to_install_it(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    with pytest.raises(UserError, match="pip install"):
        write_logs(find_runs([world / "toy-lora-s1"]), tmp_path / "logs")
    assert not (tmp_path / "logs").exists() and "inspect_ai" in INSTALL


def test_what_the_logs_lack_is_told_and_the_status_is_not_0(world, tmp_path, monkeypatch, capsys):
    for missing, status in (["toy-lora-s1, toy: no grades at hand"], INCOMPLETE), ([], 0):
        made = ([tmp_path / "logs" / "toy-lora-s1_toy.eval"], missing)
        monkeypatch.setattr(inspect_logs, "write_logs", lambda runs, output, made=made: made)
        monkeypatch.setattr(sys, "argv", ["eval.report", "--inspect", str(world / "toy-lora-s1"), f"output={tmp_path}"])
        assert report() == status
        printed = capsys.readouterr()
        assert "toy-lora-s1_toy.eval" in printed.out
        assert printed.err == "".join(f"missing in the logs: {line}\n" for line in missing)


@pytest.mark.slow
def test_every_answer_comes_back(world, tmp_path):
    log = pytest.importorskip("inspect_ai.log", reason="no inspect_ai: pip install -e '.[inspect]'")
    score = world / "toy-lora-s1" / "scores" / "likelihood.json"  # has no answers
    write_json_atomic(score, {"task": "likelihood", "version": "1", "n": 3, "metrics": {"p_right": 0.5}})
    try:
        files, missing = write_logs(find_runs([world]), tmp_path / "logs")
    finally:
        score.unlink()
    assert len(files) == 7 and not missing
    read = log.read_eval_log(str(tmp_path / "logs" / "toy-ba_lora-s1_toy.eval"))
    grades = [json.loads(line) for line in (world / "toy-ba_lora-s1/grades/toy.jsonl").read_text().splitlines()]
    samples = sorted(read.samples, key=lambda sample: int(sample.id.split("/")[1]))  # the reader sorts ids as texts
    assert [sample.id for sample in samples] == [f"toy/{place}" for place in range(ITEMS)]
    for sample, grade in zip(samples, grades, strict=True):
        assert {name: score.value for name, score in sample.scores.items()} == grade["metrics"]
        assert sample.target == grade["gold"] and sample.metadata["groups"] == grade["groups"]
    for sample, text in zip(samples, HOSTILE, strict=False):
        assert sample.output.completion == text.encode("utf-8", "replace").decode()
    score = json.loads((world / "toy-ba_lora-s1/scores/toy.json").read_text())
    assert {one.name: one.metrics["mean"].value for one in read.results.scores} == score["metrics"]
    assert read.eval.task == "toy" and read.eval.metadata["run"]["method"] == "ba_lora" and read.status == "success"
    judged = log.read_eval_log(str(tmp_path / "logs" / "toy-full_ft-judged_mt_bench.eval"))
    assert len(judged.samples[1].metadata["judgements"]) == 2
    code = log.read_eval_log(str(tmp_path / "logs" / "toy-pissa-code_humaneval.eval"))
    assert code.samples[1].scores["pass@1"].answer == "failed: AssertionError: 1 != 2"
    assert [sample.output.stop_reason for sample in samples][8:10] == ["stop", "max_tokens"]
