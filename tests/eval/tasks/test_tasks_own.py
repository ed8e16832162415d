"""Tasks for data of one's own: qa, mgsm in eleven languages, judge on any prompts."""

import json

import pytest

from ba_lora.errors import UserError
from ba_lora.io import read_jsonl
from eval.scoring import ScoreOptions, score_file
from eval.tasks import get_task
from eval.tasks.judge import RUBRIC, read_rubric
from eval.tasks.mgsm import MARKERS
from eval.tasks.qa import answer_words


def graded(task, gold, completion):
    item = get_task(task).items_from_rows([{"question": "?", "answer": gold}], source="x")[0]
    return get_task(task).grade(item, completion).metrics


@pytest.mark.parametrize(
    ("gold", "completion", "exact", "f1", "numeric"),
    [
        ("The Eiffel Tower", "eiffel tower!", 1, 1, 1),
        ("Paris, France", "It is Paris", 0, 0.4, 0),
        (["Bonn", "Berlin"], "«Berlin».", 1, 1, 1),
        ("5", "The answer is: 5.0", 0, 0, 1),
        (5, "5", 1, 1, 1),
        ("१२", "12", 1, 1, 1),
        ("12", "उत्तर १२", 0, 2 / 3, 1),
        ("東京都", "東京", 0, 0.8, 0),
        ("¿Sí?", "sí", 1, 1, 1),
        ("no number", "7", 0, 0, 0),
        ("x", "", 0, 0, 0),
        ("1.5", "15", 1, 1, 0),
        ("-5", "5", 1, 1, 0),
        ("1/2", "12", 1, 1, 0),
        ("14.0", "140", 1, 1, 0),
        (["-5", "none"], "None.", 1, 1, 1),
        ("A", "A.", 1, 1, 1),
        ("A", "the", 0, 0, 0),
        ("A", "", 0, 0, 0),
        ("+", "-", 0, 0, 0),
        ("+", "+", 1, 1, 1),
    ],
)
def test_qa_is_graded_as_squad_in_any_script(gold, completion, exact, f1, numeric):
    assert graded("qa", gold, completion) == pytest.approx({"exact_match": exact, "f1": f1, "numeric": numeric})


@pytest.mark.parametrize(("completion", "invalid"), [("A", False), ("the", False), ("+", False), (" ", True)])
def test_only_an_empty_answer_to_qa_is_invalid(completion, invalid):
    item = get_task("qa").items_from_rows([{"question": "?", "answer": "A"}], source="x")[0]
    assert get_task("qa").grade(item, completion).invalid is invalid


def test_qa_normalisation_by_hand():
    assert answer_words("The cat's  “An” ٣ ＡＢ。") == ["cats", "3", "ａｂ"]
    assert answer_words("ไทย 1,000") == ["ไ", "ท", "ย", "1000"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, "one of answer and answers must hold the right answer, found question"),
        ({"question": "?", "answer": "a", "answers": ["b"]}, "one of answer and answers"),
        ({"question": "?", "answers": "a"}, "answers must be a list"),
        ({"question": "?", "answer": {"text": [1, None]}}, "answer must be text or a list of texts"),
    ],
)
def test_qa_rows_that_do_not_fit(row, message):
    with pytest.raises(UserError, match=f"x, row 0: {message}"):
        get_task("qa").items_from_rows([row], source="x")


def test_qa_reads_squads_form_and_tables():
    rows = [{"question": "?", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}}]
    rows.append({"question": "?", "answers": '["c"]', "answer": ""})
    assert [item.gold for item in get_task("qa").items_from_rows(rows, source="x")] == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
    ("language", "gold", "completion", "strict", "flexible"),
    [
        ("de", "18", "Janets Enten: 3 + 4 = 7. Die Antwort ist 18. Gut gemacht, 2 Punkte!", 0, 1),
        ("de", "1.200", "Die Antwort lautet: 1.200 Euro", 0, 1),
        ("de", "2000", "The answer is: 2.000", 1, 1),
        ("es", "0.5", "La respuesta es 0,5", 0, 1),
        ("de", "0.125", "Die Antwort ist 0,125.", 0, 1),
        ("de", "0.125", "Die Antwort ist 0.125", 0, 1),
        ("de", "1200", "Die Antwort ist 1,200", 0, 1),
        ("es", "-0.125", "The answer is: -0,125", 1, 1),
        ("fr", "1000.125", "La réponse est 1.000,125", 0, 1),
        ("ru", "3.1416", "Ответ — 3,1416", 0, 1),
        ("fr", "42", "La réponse est 42. Il reste 3 pommes.", 0, 1),
        ("ru", "7", "Ответ — 7, а не 5", 0, 1),
        ("ja", "11", "答えは１１です。5個ではない", 0, 1),
        ("zh", "33", "答案是 33。共 4 步", 0, 1),
        ("th", "9", "คำตอบคือ ๙ ไม่ใช่ 3", 0, 1),
        ("bn", "25", "উত্তর হল ২৫। 3", 0, 1),
        ("te", "6", "సమాధానం ౬. 2", 0, 1),
        ("sw", "8", "Jibu ni 8. Siyo 3.", 0, 1),
        ("en", "8", "The answer is: 8", 1, 1),
        ("es", "8", "La respuesta es 9. Fin 8", 0, 0),
    ],
)
def test_mgsm_knows_markers_digits_and_separators(language, gold, completion, strict, flexible):
    assert graded(f"mgsm_{language}", gold, completion) == {"strict": strict, "flexible": flexible}


@pytest.mark.real
@pytest.mark.parametrize("language", sorted(MARKERS))
def test_the_published_files_are_read_and_right_answers_are_right(real_data, tmp_path, language):
    path, task = real_data / "mgsm" / f"mgsm_{language}.tsv", get_task(f"mgsm_{language}")
    items, source = task.load(str(path))
    assert len(items) == 250 and source.sha256
    lines = [{"task_id": item.task_id, "completion": f"7 + 1. The answer is: {item.gold}"} for item in items]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    score = score_file(task, tmp_path / "c.jsonl", data=str(path))
    assert score["metrics"] == {"strict": 1.0, "flexible": 1.0}
    if language == "en":
        assert items[0].gold == "18"


def test_mgsm_reads_other_forms_and_refuses_what_is_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "?", "answer_number": 1200}\n')
    (tmp_path / "b.tsv").write_text("question\tanswer\n?\t#### 5\n")
    (tmp_path / "c.tsv").write_text("?\t5\t6\n")
    (tmp_path / "d.tsv").write_text("?\tfive\n")
    assert get_task("mgsm_de").load(str(tmp_path / "a.jsonl"))[0][0].gold == "1200"
    assert get_task("mgsm_de").load(str(tmp_path / "b.tsv"))[0][0].gold == "5"
    for name, message in (("c", "each line needs a question and a number"), ("d", "row 0: the answer must be a n")):
        with pytest.raises(UserError, match=message):
            get_task("mgsm_de").load(str(tmp_path / f"{name}.tsv"))
    with pytest.raises(UserError, match="unknown task 'mgsm_xx'.*mgsm_"):
        get_task("mgsm_xx")


def test_judge_rates_any_prompts_by_a_rubric_of_ones_own(tmp_path, monkeypatch):
    from tests.support.judge_server import JudgeServer, completion

    rows = [
        {"prompt": "Wer war Goethe?", "reference": "Ein Dichter.", "category": "facts"},
        {"turns": ["Hallo", "Und {nun}?"]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.rubric.txt").write_text("Bewerte {answer} auf {question} ({reference}) als [[rating]] {x}.")
    ids = ["judge/0/turn1", "judge/1/turn1", "judge/1/turn2"]
    texts = ["Ein {question}.", "Hi", "Gut"]
    lines = [{"task_id": name, "completion": text} for name, text in zip(ids, texts, strict=True)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with JudgeServer(lambda number, body: completion("[[7]]")) as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        score = score_file(
            get_task("judge"), tmp_path / "c.jsonl", data=str(tmp_path / "prompts.jsonl"), options=ScoreOptions()
        )
    asked = {request["messages"][-1]["content"] for request in server.requests}
    assert "Bewerte Ein {question}. auf Wer war Goethe? (Ein Dichter.) als [[rating]] {x}." in asked
    assert "Bewerte Hi\n\nGut auf Hallo\n\nUnd {nun}? (none) als [[rating]] {x}." in asked
    assert score["n"] == 3 and score["ratings"]["num_rated"] == 3 and "rubric_hash" in score["judge"]["id"]
    assert len(read_jsonl(tmp_path / "c.judgements.jsonl")) == 9  # three of each
    (tmp_path / "prompts.rubric.txt").write_text("Bewerte {answer} als [[rating]].")
    with pytest.raises(UserError, match=r"prompts.rubric.txt: .*it lacks \{question\}"):
        read_rubric(tmp_path / "prompts.jsonl")
    assert read_rubric(tmp_path / "others.jsonl") == RUBRIC


def test_prompts_that_are_none(tmp_path):
    with pytest.raises(UserError, match="x, row 0: prompt must be text, or turns a list"):
        get_task("judge").items_from_rows([{"text": "?"}], source="x")


@pytest.mark.parametrize(
    ("prompts", "rubric"),
    [
        ("my.v2.jsonl", "my.v2.rubric.txt"),
        ("my.v2.jsonl", "my.v2.jsonl.rubric.txt"),
        ("my.v2.jsonl.gz", "my.v2.rubric.txt"),
        ("my.v2.jsonl.gz", "my.v2.jsonl.gz.rubric.txt"),
        ("my.v2.jsonl", "my.rubric.txt"),
    ],
)
def test_a_rubric_lies_beside_its_prompts(tmp_path, prompts, rubric):
    text = "{question} {answer} [[rating]]"
    (tmp_path / rubric).write_text(text)
    assert read_rubric(tmp_path / prompts) == (RUBRIC if rubric == "my.rubric.txt" else text)
