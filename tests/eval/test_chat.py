"""eval.chat: the run's own template, turns, two models side by side, and what a terminal must not be told."""

import io

import pytest

from ba_lora.chat import ChatTemplate
from ba_lora.console import visible
from ba_lora.errors import UserError
from eval import chat
from eval.chat import Speaker, side_by_side, talk
from eval.engines.base import Completion, Sampling
from eval.engines.requests import GenerateOptions
from tests.support.chat_templates import FAMILIES, chat_tokenizer
from tests.support.page_world import write_run


class Echo:
    """An engine that answers with the end of its prompt."""

    def __init__(self):
        self.asked, self.ends = [], []

    def generate(self, prompts, *, adapter, chat_end=None, **sampling):
        self.ends.append(chat_end)
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


def test_a_run_trained_in_a_chat_template_is_asked_in_it(tmp_path, tiny_model):
    run = write_run(tmp_path / "run", "data.template=chat", "eval.options={}", method="lora")
    with pytest.raises(UserError, match="none of its exports holds it"):
        chat._template(str(run), GenerateOptions())
    text = FAMILIES["chatml"][0]
    (run / "adapter").mkdir()
    (run / "adapter" / "chat_template.jinja").write_text(text)
    assert chat._template(str(run), GenerateOptions()) == ("chat", text)
    assert chat._template(str(run), GenerateOptions(template="alpaca_step_by_step")) == ("alpaca_step_by_step", None)
    template = ChatTemplate(chat_tokenizer(tiny_model, "chatml"), text=text)
    engine = Echo()
    talk([Speaker("run", engine, None, "chat", Sampling(max_new_tokens=9), template)], ["a", "b"], print, keep=True)
    (first, *_), (second, *_) = engine.asked
    assert first == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n" and second.count("assistant") == 2
    assert engine.ends == [template.end_id] * 2


@pytest.mark.slow
def test_a_real_model_answers(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 + 3?\nAnd 4?\n"))
    assert chat.main([str(tiny_model), "--turns", "max_new_tokens=5"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) >= 2
