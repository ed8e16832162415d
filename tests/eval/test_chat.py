"""eval.chat: the run's own template, turns, two models side by side, and what a terminal must not be told."""

import io

import pytest

from ba_lora.errors import UserError
from eval import chat
from eval.chat import Speaker, side_by_side, talk, visible
from eval.engines.base import Completion, Sampling
from tests.support.page_world import write_run


class Echo:
    """An engine that answers with the end of its prompt."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, *, adapter, **sampling):
        self.asked.append((prompts[0], adapter, sampling["max_new_tokens"]))
        return [[Completion(f" answer {len(self.asked)}\x1b[2J", "length", 3)]]


def speaker(name, engine, adapter=None):
    return Speaker(name, engine, adapter, "alpaca", Sampling(max_new_tokens=9))


def test_each_question_is_asked_by_itself_or_after_the_others():
    for keep, turns in ((False, 1), (True, 2)):
        engine, written = Echo(), []
        talk([speaker("run", engine, "a0")], ["first\n", "\n", "second\n"], written.append, keep=keep)
        assert [prompt.count("### Instruction:") for prompt, _, _ in engine.asked] == [1, turns]
        assert engine.asked[0][1:] == ("a0", 9) and "answer 1⟨U+001B⟩[2J […]" in written[1]


def test_new_and_quit():
    engine, written = Echo(), []
    talk([speaker("run", engine)], ["a", "/new", "b", "/what now", "/quit", "c"], written.append, keep=True)
    assert [prompt.count("### Instruction:") for prompt, _, _ in engine.asked] == [1, 1]
    assert any("/what is unknown" in line for line in written)


def test_two_stand_in_columns_where_there_is_room():
    wide = side_by_side(["one", "two"], ["a b", "c\nd"], width=101).splitlines()
    assert [line.split("│")[1].strip() for line in wide[1:]] == ["[two]", "c", "d"]
    assert side_by_side(["one", "two"], ["a", "b"], width=40).split() == ["[one]", "a", "[two]", "b"]
    assert visible("a\u202eb\tc\n") == "a⟨U+202E⟩b\tc\n"


def test_a_classifier_is_refused_and_so_are_three_runs(tmp_path):
    run = write_run(tmp_path / "run", method="lora", base="nlu/minilm", task="sst2")
    with pytest.raises(UserError, match="is a classifier"):
        chat.main([str(run)])
    with pytest.raises(UserError, match="one RUN or two"):
        chat.main(["a", "b", "c"])
    with pytest.raises(UserError, match="num_samples"):
        chat.main(["a", "num_samples=2"])


@pytest.mark.slow
def test_a_real_model_answers(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 + 3?\nAnd 4?\n"))
    assert chat.main([str(tiny_model), "--turns", "max_new_tokens=5"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) >= 2
