"""A model card is published: nothing in it is more than a name, and no name breaks it."""

import dataclasses

import pytest
import yaml

from ba_lora.config.layers import load_config
from ba_lora.io import read_json, write_json_atomic
from ba_lora.runs.card import refresh_run, write_model_card


def card(tmp_path, config, result=None):
    for name in ("adapter", "lora", "merged"):
        (tmp_path / name).mkdir(exist_ok=True)
    write_model_card(tmp_path, config, result or {})
    return {name: (tmp_path / name / "README.md").read_text() for name in ("adapter", "lora", "merged")}


def head_of(text):
    assert text.startswith("---\n")
    head, rest = text[4:].split("---\n", 1)
    return yaml.safe_load(head), rest


@pytest.mark.parametrize(
    "name", ["a\n---\n# Other", 'x"); import os; ("', "a: b #c", "<script>x</script>", "a|b", "```\nx"]
)
def test_no_name_breaks_a_card(tmp_path, name):
    config = load_config("configs/nlg/toy.yaml")
    config = dataclasses.replace(config, method=name, model=dataclasses.replace(config.model, name=name))
    data = {"rows_used": 3, "name": name, "source": name, "revision": name, "sha256": "0"}
    scores = {name: {"n": 4, "metrics": {name: 0.5, "other": None}}}
    for text in card(tmp_path, config, {"data": data, "evaluation": scores}).values():
        head, rest = head_of(text)
        words = " ".join(name.split())
        assert (head["base_model"], head["tags"]) == (words, ["ba-lora", words])
        assert [line for line in rest.splitlines() if line.startswith("# ")][0].count(" tuned with ") == 1
        headings = [line for line in rest.split("## Configuration")[0].splitlines() if line.startswith("#")]
        assert len(headings) == 2 and headings[1] == "## Scores"
        rows = [line for line in rest.splitlines() if line.startswith("| ") and " 4 |" in line]
        assert len(rows) == 2 and all(row.replace("\\|", "").count("|") == 5 for row in rows)
        assert "<script>" not in rest.split("## Configuration")[0].split("```python")[0]
        fence = rest.split("## Configuration\n\n")[1].partition("yaml\n")[0]
        body, end = rest.split(f"{fence}yaml\n")[1].split(f"\n{fence}", 1)
        assert set(fence) == {"`"} and end == "\n" and yaml.safe_load(body)["method"] == name
        for code in rest.split("```python\n")[1:]:
            compile(code.split("\n```")[0], "card", "exec")


def test_a_card_names_no_folder_of_its_machine(tmp_path):
    words = ["model.name=/home/someone/bases/tiny", "data.source=/secret/rows.jsonl", "data.name=metamathqa"]
    words += ["adapter.factors_cache=/secret/factors", "eval.data.toy=/secret/toy.jsonl"]
    config = load_config("configs/nlg/toy.yaml", overrides=words)
    for name, text in card(tmp_path, config, {"data": {"source": "/secret/rows.jsonl"}}).items():
        assert "/secret" not in text and "/home" not in text
        assert head_of(text)[0]["base_model"] == "tiny"
        assert "rows.jsonl" in text and (name == "merged") == ("AutoModelForCausalLM.from_pretrained(FOLDER)" in text)


def test_a_card_and_the_result_get_the_scores_that_have_changed(tmp_path):
    config = load_config("configs/nlg/toy.yaml", overrides=[f"output_dir={tmp_path}", f"results_dir={tmp_path}"])
    trained = {"finished_at": "now", "status": "ok"}
    write_json_atomic(tmp_path / "train.json", trained)
    write_json_atomic(config.result_path, trained | {"config": {"trainer": {}}, "evaluation": {}})
    card(tmp_path, config)
    score = {"task": "likelihood", "n": 4, "metrics": {"p_wrong": 0.25}, "seconds": 3.0}
    write_json_atomic(tmp_path / "scores" / "likelihood.json", score)
    assert refresh_run(tmp_path, config)
    assert read_json(config.result_path)["evaluation"]["likelihood"]["metrics"] == {"p_wrong": 0.25}
    for name in ("adapter", "lora", "merged"):
        assert "| likelihood | p_wrong | 25.00 | 4 |" in (tmp_path / name / "README.md").read_text()
    write_json_atomic(tmp_path / "scores" / "likelihood.json", score | {"seconds": 4.0})
    assert not refresh_run(tmp_path, config)  # the same score, which took longer
