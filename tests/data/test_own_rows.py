"""Rows of one's own: files of every kind, columns, messages, templates; labels on the answers and nothing else."""

import datetime
import gzip
import importlib.util
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from ba_lora.chat import ChatTemplate
from ba_lora.config.layers import load_config
from ba_lora.config.schema import ModelConfig
from ba_lora.config.schema_nlg import NLGDataConfig
from ba_lora.errors import UserError
from ba_lora.models.tokenizer import load_tokenizer
from ba_lora.prompts import build_prompt
from data import sets, tokenized
from data.conversations import read_conversation
from data.nlg import load_training_data
from tests.support.chat_templates import FAMILIES, chat_tokenizer

ROWS = [
    {"frage": f"Was ist {n}?", "antwort": f"Das ist {n}.", "kontext": "" if n % 2 else f"Zahl {n}"} for n in range(4)
]
COLUMNS = {"instruction": "frage", "response": "antwort"}
FORM = "columns: {instruction: a, response: b}\n"  # of a file of a set
TALK = [
    {"role": "user", "content": "Hallo, wer bist du?"},
    {"role": "assistant", "content": "Ein Modell."},
    {"role": "user", "content": "Und was kannst du?"},
    {"role": "assistant", "content": "Rechnen: 1 + 1 = 2."},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(ModelConfig(name=str(tiny_model)))


def answers(item, tokenizer):
    """Return the labelled texts of a row, one for each run of labels."""
    found, ids = [], []
    for label in [*item["labels"], -100]:
        if label != -100:
            ids.append(label)
        elif ids:
            found.append(tokenizer.decode(ids))
            ids = []
    return found


def test_values_of_parquet_that_json_does_not_know_are_told_or_not_read(tokenizer, tmp_path):
    when = datetime.datetime(2024, 1, 1)
    turns = [{"role": role, "content": "x", "at": when} for role in ("user", "assistant")]
    rows = [{"a": b"x", "b": when, "talk": [turn | {"raw": b"1"} for turn in turns]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    columns = NLGDataConfig(source=source, columns={"instruction": "a", "response": "b"})
    with pytest.raises(UserError, match="row 0: a, b is not text"):
        load_training_data(columns, tokenizer)
    assert load_training_data(NLGDataConfig(source=source, messages="talk"), tokenizer).report["rows_used"] == 1


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(rows, mark):
    return "\n".join([mark.join(rows[0]), *(mark.join(row.values()) for row in rows)]) + "\n"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_files_of_every_kind_give_the_same_tokens(tokenizer, tmp_path, ending, packed):
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a")
        content = (tmp_path / "a").read_bytes()
    elif ending in ("csv", "tsv"):
        content = table(ROWS, "," if ending == "csv" else "\t").encode()
    else:
        content = (json.dumps(ROWS) if ending == "json" else "\n".join(map(json.dumps, ROWS))).encode()
    path = tmp_path / (f"rows.{ending}.gz" if packed else f"rows.{ending}")
    path.write_bytes(gzip.compress(content) if packed else content)
    data = load_training_data(NLGDataConfig(source=str(path), columns=COLUMNS, num_rows=None), tokenizer)
    assert [answers(item, tokenizer) for item in data.dataset] == [[f" Das ist {n}.</s>"] for n in range(4)]
    assert data.report["name"] == "own" and data.report["manifest"] == "unknown"


def test_several_files_are_one_set_and_must_be_alike(tokenizer, tmp_path):
    files = [write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.jsonl", ROWS[2:])]
    data = load_training_data(NLGDataConfig(source=files, columns=COLUMNS), tokenizer)
    assert data.report["rows_used"] == 4 and data.report["file_sha256"].count("+") == 1
    files[1] = write(tmp_path / "c.jsonl", [{"frage": "?"}])
    with pytest.raises(UserError, match="row 2 lacks a column, antwort"):
        load_training_data(NLGDataConfig(source=files, columns=COLUMNS), tokenizer)


def test_an_input_stands_in_alpacas_own_frame(tokenizer, tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    config = NLGDataConfig(source=source, columns=COLUMNS | {"input": "kontext"})
    first, second, *_ = load_training_data(config, tokenizer).dataset
    assert "### Input:\nZahl 0\n\n### Response: Das ist 0." in tokenizer.decode(first["input_ids"])
    assert tokenizer.decode(second["input_ids"]) == "<s>" + build_prompt("Was ist 1?") + " Das ist 1.</s>"


@pytest.mark.parametrize("value", [0, False, []])
def test_an_input_that_is_no_text_is_refused(tokenizer, tmp_path, value):
    source = write(tmp_path / "rows.jsonl", [ROWS[0] | {"kontext": value}])
    with pytest.raises(UserError, match="is not text"):
        load_training_data(NLGDataConfig(source=source, columns=COLUMNS | {"input": "kontext"}), tokenizer)


def test_an_input_column_that_no_row_has_is_refused(tokenizer, tmp_path):
    """A row may lack it, as json rows do; a name that nothing has is a slip."""
    source = write(
        tmp_path / "rows.jsonl", [*ROWS[:1], *({k: v for k, v in r.items() if k != "kontext"} for r in ROWS)]
    )
    data = load_training_data(NLGDataConfig(source=source, columns=COLUMNS | {"input": "kontext"}), tokenizer)
    assert data.report["rows_used"] == 5 and "Zahl 0" in tokenizer.decode(data.dataset[0]["input_ids"])
    with pytest.raises(
        UserError, match="no row of .*rows.jsonl has the column kontxt .* antwort, frage, kontext: name"
    ):
        load_training_data(NLGDataConfig(source=source, columns=COLUMNS | {"input": "kontxt"}), tokenizer)


@pytest.mark.parametrize("form", ["openai", "sharegpt", "json text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_answers_and_their_end_tokens(tiny_model, tmp_path, family, form):
    tokenizer = chat_tokenizer(tiny_model, family)
    talk = TALK if family == "gemma" else [{"role": "system", "content": "Sei kurz."}, *TALK]
    if form == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        talk = [{"from": names[turn["role"]], "value": turn["content"]} for turn in talk]
    rows = [{"talk": json.dumps(talk) if form == "json text" else talk}]
    config = NLGDataConfig(source=write(tmp_path / "a.jsonl", rows), messages="talk", template="chat")
    (item,) = load_training_data(config, tokenizer).dataset
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}
    mark = end.get(family, "<|im_end|>")
    blank, think = (" " if family == "mistral" else ""), ("<think>\n\n</think>\n\n" if family == "qwen3" else "")
    assert answers(item, tokenizer) == [f"{blank}Ein Modell.{mark}", f"{blank}{think}Rechnen: 1 + 1 = 2.{mark}"]
    roles = [
        {
            "role": {"human": "user", "gpt": "assistant"}.get(turn.get("from"), turn.get("from")),
            "content": turn["value"],
        }
        if form == "sharegpt"
        else turn
        for turn in talk
    ]
    whole = tokenizer.apply_chat_template(roles, return_dict=True)
    assert item["input_ids"] == whole["input_ids"], "nothing is added to what the template writes"
    chat = ChatTemplate(tokenizer)
    first = next(place for place, label in enumerate(item["labels"]) if label != -100)
    asked = tokenizer(chat.prompt(roles[: -len(TALK) + 1]), add_special_tokens=False)["input_ids"]
    assert item["input_ids"][:first] == asked, "generation starts from the very tokens before the answer"
    assert tokenizer.convert_ids_to_tokens(chat.end_id) == mark


def test_labels_are_those_of_the_templates_own_mask(tiny_model):
    tokenizer = chat_tokenizer(tiny_model, "chatml_with_mask")
    ids, learned = ChatTemplate(tokenizer).encode(TALK, "row 0")
    own = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert own["input_ids"] == ids and own["assistant_masks"] == [int(value) for value in learned]
    block = "{% generation %}{{ m.content +"
    wrong = tokenizer.chat_template.replace(block, "{{ m.content[:3] }}{% generation %}{{ m.content[3:] +")
    with pytest.raises(UserError, match="row 0: .*marks other tokens as answers"):
        ChatTemplate(tokenizer, text=wrong).check_mask(TALK, ids, learned, "row 0")


def test_every_row_is_compared_with_the_templates_own_mask(tiny_model, tmp_path):
    """Here the mask is wrong only for a second answer, which the first 60 rows lack."""
    tokenizer = chat_tokenizer(tiny_model, "chatml_with_mask")
    text = tokenizer.chat_template.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.index0 < 2")
    (tmp_path / "own.jinja").write_text(text)
    source = write(tmp_path / "a.jsonl", [{"talk": TALK[:2]}] * 60 + [{"talk": TALK}])
    config = NLGDataConfig(source=source, messages="talk", template=str(tmp_path / "own.jinja"), num_rows=None)
    with pytest.raises(UserError, match="row 60: .*marks other tokens as answers"):
        load_training_data(config, tokenizer)


PUBLISHED = {  # templates as their makers published them; TRL brings them along
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "llama3_training": "<|eot_id|>",
    "qwen2_5": "<|im_end|>",
    "qwen2_5_training": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gemma_training": "<end_of_turn>",
    "phi3": "<|end|>",
    "phi3_training": "<|end|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "lfm2_v2": "<|im_end|>",
}


@pytest.mark.parametrize("name", [*PUBLISHED, "deepseekv3"])
def test_published_templates(tiny_model, name):
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("TRL, which brings the templates along, is not installed")
    text = (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    words = set(re.findall(r"<[|｜]?[\w▁]+[|｜]?>", text)) - {"<think>", "</think>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(words)})
    chat = ChatTemplate(tokenizer, text=text)
    if name == "deepseekv3":  # it asks for a thinking that it does not write into a conversation
        with pytest.raises(UserError, match="writes what stands before answer 1 in another way"):
            chat.encode(TALK, "row 0")
        return
    mark = PUBLISHED[name]
    ids, learned = chat.encode(TALK, "row 0")
    item = {"labels": [token if label else -100 for token, label in zip(ids, learned, strict=True)]}
    assert [part.strip() for part in answers(item, tokenizer)] == [f"Ein Modell.{mark}", f"Rechnen: 1 + 1 = 2.{mark}"]
    assert chat.end_id == tokenizer.convert_tokens_to_ids(mark)
    assert chat.has_mask == name.endswith("_training")
    if chat.has_mask:
        chat.check_mask(TALK, ids, learned, "row 0")


def test_a_token_across_the_seam_is_taken_apart(tiny_model):
    """A prompt that ends with a blank, which the tokenizer would join to the answer's first word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", "<unk>", "▁Q", "▁", "A", "▁A", "Q"]
    inner = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("▁", "A"), ("▁", "Q")], unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ' ' }}{% else %}{{ m.content + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    chat = ChatTemplate(tokenizer, text=text)
    ids, learned = chat.encode([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "row 0")
    assert tokenizer.convert_ids_to_tokens(ids) == ["Q", "▁", "A", "</s>"] and learned == [False, False, True, True]


# Templates that write no end token behind an answer, so that the next turn's opening stands there.
_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '\\n' }}{% endfor %}"
_OPEN = "{{ '<|im_start|>assistant\\n' }}"
NO_END = _TURNS + "{% if add_generation_prompt %}" + _OPEN + "{% else %}{{ eos_token }}{% endif %}"
# As Mistral's later ones: the system turn stands before the last question.
MOVED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}{% if loop.last or loop.index0 == "
    "messages | length - 2 %}{{ messages[0].content + ' ' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)

THINKING = [TALK[0], {"role": "assistant", "content": "<think>hm</think>Ja."}, *TALK[2:]]


@pytest.mark.parametrize(
    ("talk", "template", "message"),
    [
        (THINKING, FAMILIES["qwen3"][0], "changes answer 1 of the conversation"),
        (TALK, "{% for m in messages %}{{ m.content }}{% endfor %}", "ends an answer with no special token"),
        (TALK, "{{ messages | length }}", "writes what stands before answer 1 in another way|changes answer 1"),
        (TALK, NO_END, "ends the last answer with '</s>', and has .<.im_start.>. between an answer and a further"),
        (TALK[:2], NO_END, "ends the last answer with '</s>', and has .<.im_start.>. between an answer and a further"),
        (TALK, _TURNS + _OPEN, "opens a further answer behind every conversation"),
        (TALK[:2], _TURNS + _OPEN, "opens a further answer behind every conversation"),
        ([{"role": "system", "content": "Sei kurz."}, *TALK], MOVED, "writes what stands before answer 1 in another"),
        (TALK, "{{ 1 / 0 }}", "refuses a conversation of user.*division by zero"),
        (TALK, "{{ messages[0].no.such }}", "refuses a conversation of user"),
    ],
)
def test_a_template_that_would_mislabel_is_refused(tiny_model, tmp_path, talk, template, message):
    tokenizer = chat_tokenizer(tiny_model, "qwen3")
    (tmp_path / "own.jinja").write_text(template)
    config = NLGDataConfig(
        source=write(tmp_path / "a.jsonl", [{"talk": talk}]), messages="talk", template=str(tmp_path / "own.jinja")
    )
    with pytest.raises(UserError, match=message) as error:
        load_training_data(config, tokenizer)
    assert "a.jsonl, row 0" in str(error.value) or str(error.value).startswith("template=")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": ["user"], "content": "x"}], "turn 0: the role .*user.* is unknown"),
        ([{"role": "robot", "content": "x"}], "row 1, turn 0: the role 'robot' is unknown; known are system, user"),
        ([{"role": "user", "content": [{"type": "text"}]}], "turn 0: content must be text"),
        ([{"text": "x"}], "has neither role and content nor from and value; it has text"),
        (["x"], "turn 0 is no object of role and content"),
        ("no json", "is text, but no JSON list of turns"),
        ("[" * 100_000, "is text, but no JSON list of turns"),
        ('[{"role": "user", "content": "\\ud83d"}]', "row 1: talk holds half of a character"),
        (5, "must be a list of turns, found int"),
    ],
)
def test_bad_turns_are_named_with_their_row(tokenizer, tmp_path, turns, message):
    rows = [{"talk": TALK[:2]}, {"talk": turns}]
    config = NLGDataConfig(source=write(tmp_path / "a.jsonl", rows), messages="talk")
    with pytest.raises(UserError, match=message) as error:
        load_training_data(config, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "kept", "shortened"),
    [
        (["system: ", "user: a", "assistant: b"], "ab", False),
        (["system: s", "user: a", "assistant: b", "user: c", "assistant: "], "sab", True),
        (["user: a", "assistant: b", "user: ", "assistant: d"], "ab", True),
        (["user: a", "assistant: ", "user: c", "assistant: d"], "", False),
        (["user: a", "system: ", "assistant: b"], "ab", False),
        (["user: a", "assistant: b", "user: c"], "ab", True),
        (["assistant: x", "user: a", "assistant: b"], "ab", True),
        (["system: s", "assistant: ", "assistant: x", "user: a", "assistant: b"], "sab", True),
        (["assistant: x"], "", False),
    ],
)
def test_what_stands_around_the_exchanges_is_left_out_and_told(words, kept, shortened):
    turns = [dict(zip(("role", "content"), word.split(": "), strict=True)) for word in words]
    found, left_out = read_conversation({"talk": turns}, sets.DataSet("own", messages="talk"), "row 0")
    assert "".join(message["content"] for message in found) == kept and left_out == shortened


def test_exchanges_count_from_the_first_question():
    turns = [{"from": name, "value": text} for name, text in zip(["gpt", "human", "gpt", "human"], "xabc", strict=True)]
    found, left_out = read_conversation({"talk": turns}, sets.DataSet("own", messages="talk", exchanges=1), "row 0")
    assert [message["content"] for message in found] == ["a", "b"] and left_out
    assert read_conversation({"talk": turns[1:]}, sets.DataSet("own", messages="talk", exchanges=1), "")[1] is False


def test_what_the_alpaca_frame_has_no_room_for(tokenizer, tmp_path):
    source = write(tmp_path / "a.jsonl", [{"talk": TALK}])
    with pytest.raises(UserError, match="row 0 has several exchanges .*data.exchanges=1"):
        load_training_data(NLGDataConfig(source=source, messages="talk"), tokenizer)
    (item,) = load_training_data(NLGDataConfig(source=source, messages="talk", exchanges=1), tokenizer).dataset
    assert answers(item, tokenizer) == [" Ein Modell.</s>"]
    source = write(tmp_path / "b.jsonl", [{"talk": [{"role": "system", "content": "x"}, *TALK[:2]]}])
    with pytest.raises(UserError, match="row 0 has a system turn"):
        load_training_data(NLGDataConfig(source=source, messages="talk"), tokenizer)
    with pytest.raises(UserError, match="has no chat template"):
        load_training_data(NLGDataConfig(source=source, messages="talk", template="chat"), tokenizer)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.columns={instruction: a}"], "data.columns has no response: add response: COLUMN"),
        (["data.columns={question: a, response: b}"], "data.columns=question is unknown.*instruction, input, response"),
        (["data.columns={instruction: a, response: b}", "data.messages=m"], "columns and messages"),
        (["data.columns=[a, b]"], r"data.columns=.*: give data.columns=\{NAME: VALUE\}"),
        (["data.columns={instruction: a, response: a}"], "columns of their own"),
        (["data.template=chatt"], "data.template=chatt is unknown.*nearest: chat"),
        (["data.template=no.jinja"], "no such file: .*no.jinja"),
        (
            ["data.columns={instruction: a, response: yes}"],
            "data.columns=.*: a mapping, each a word.* write .* in quotes",
        ),
        (["data.messages=no"], "data.messages=False: a word is needed; YAML reads yes, no"),
        (["eval.tasks=[[qa]]"], "eval.tasks=.*: a list, each a word, is needed$"),
        (["data.revision=main"], "data.revision=main has no effect without rows of the hub"),
        (["data.source=5"], "data.source=5: a file, a list of files or a hub set is needed"),
    ],
)
def test_a_wrong_key_is_told_before_anything_is_read(words, message):
    with pytest.raises(UserError, match=message) as error:
        load_config("toy", overrides=["data.source=rows.jsonl", *words])
    assert "\n" not in str(error.value)


def test_a_new_set_is_a_file(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(
        "columns: {instruction: frage, response: antwort}\nreplace: {response: [['Das', 'Es']]}\n"
    )
    monkeypatch.setattr(sets, "SETS_PATH", tmp_path)
    source = write(tmp_path / "rows.jsonl", ROWS)
    data = load_training_data(NLGDataConfig(name="mine", source=source), tokenizer)
    assert answers(data.dataset[0], tokenizer) == [" Es ist 0.</s>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colums: {}", "unknown key colums .nearest: columns"),
        ("hub: a/b", "names neither columns nor messages"),
        ("columns: [a, b]", "columns: .*: a mapping, each a word, is needed"),
        ("columns: {instruction: a, response: yes}", "in quotes"),
        ("columns: {instruction: a}", "columns has no response"),
        ("messages: no", "messages: False: a word is needed; YAML"),
        ("messages: [a]", "messages: .*: a word is needed"),
        ("messages: m\nexchanges: two", "exchanges: two: a whole number is needed"),
        ("messages: m\nexchanges: 0", "exchanges is 0: it must be a number of at least 1"),
        ("messages: m\nreplace: {response: [[a, b]]}", "replace.response has no effect: texts in messages are not"),
        (f"{FORM}exchanges: 1", "exchanges has no effect on columns"),
        (f"{FORM}replace: [[a, b]]", "replace: .* a mapping, each a list"),
        (f"{FORM}replace: {{response: [ab]}}", "replace: .* a mapping, each a list"),
        (f"{FORM}replace: {{response: [[[a], b]]}}", "replace: .* a mapping, each a list"),
        (f"{FORM}replace: {{answer: [[a, b]]}}", "replace.answer has no effect: columns has instruction, response"),
        (f"{FORM}replace: {{response: [[a, b, c]]}}", "replace needs pairs"),
        (f"{FORM}replace: {{response: [['(', '']]}}", "replace needs pairs"),
        (f"{FORM}replace: {{response: [[a, '\\1']]}}", "replace needs pairs .*invalid group reference"),
    ],
)
def test_a_wrong_file_of_a_set_is_told(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(sets, "SETS_PATH", tmp_path)
    sets.named_set.cache_clear()
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        sets.named_set("mine")
    assert str(error.value).startswith(f"{tmp_path}/mine.yaml") and "\n" not in str(error.value)


def test_many_rows_are_tokenized_by_several_processes_alike(tokenizer, tmp_path, monkeypatch):
    rows = [{"frage": f"{n}?", "antwort": "x" * (n % 7)} for n in range(60)] + [{"frage": "1?", "antwort": "x"}]
    config = NLGDataConfig(source=write(tmp_path / "rows.jsonl", rows), columns=COLUMNS, num_rows=None)
    one = load_training_data(config, tokenizer)
    monkeypatch.setattr(tokenized, "MANY_ROWS", 50)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    several = load_training_data(config, tokenizer)
    assert several.dataset.to_list() == one.dataset.to_list()
    assert several.report == one.report and several.numbers == one.numbers
    assert one.report["rows_empty"] == 9 and one.numbers["duplicate"] == [60] and one.report["rows_duplicate"] == 1
    assert not list((tmp_path / "cache").rglob("rows-*")), "the rows' own file is removed"
