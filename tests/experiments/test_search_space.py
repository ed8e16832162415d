"""A search space is read to the letter, or refused in one line before anything is trained."""

import csv
import gzip
import json
from pathlib import Path

import pytest
import yaml

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.experiments.search.space import available_spaces, check_runs, load_space
from ba_lora.experiments.search.trials import TrialRuns
from tests.conftest import ROOT

HELDOUT = ["data.heldout_share=0.1", "trainer.eval_strategy=epoch"]
RATE = {"float": [1e-4, 1e-2], "log": True}
SPACE = {"title": "t", "trials": 3, "objective": "heldout_loss", "overrides": HELDOUT}


@pytest.fixture
def write(tmp_path):
    def file(**changes):
        path = tmp_path / "space.yaml"
        content = SPACE | {"parameters": {"trainer.learning_rate": RATE}} | changes
        path.write_text(
            yaml.safe_dump({key: value for key, value in content.items() if value is not ...}, sort_keys=False)
        )
        return str(path)

    return file


def parameter(**entry):
    return {"parameters": {"trainer.learning_rate": entry}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonsense": 1}, "unknown key nonsense"),
        ({"engin": "tpe"}, "unknown key engin .nearest: engine"),
        ({"title": ...}, "title is missing"),
        ({"parameters": ...}, "parameters is missing"),
        ({"parameters": {}}, "parameters is empty"),
        ({"parameters": ["a"]}, r"parameters: \['a'\]: a mapping is needed"),
        ({"trials": ...}, "trials is missing"),
        ({"trials": 0}, "trials: 0: a whole number from 1"),
        ({"trials": True}, "trials: True"),
        ({"trials": 2.5}, "trials: 2.5"),
        ({"trials_at_once": 0}, "trials_at_once: 0"),
        ({"search_seed": -1}, "search_seed: -1"),
        ({"seeds": []}, r"seeds: \[\]"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\]: a list of different"),
        ({"seeds": ["a"]}, r"seeds: \['a'\]: a list, each a whole number, is needed"),
        ({"engine": "bayes"}, "engine=bayes is unknown: choose one of tpe, random, grid, nomad"),
        ({"engine": "grid"}, "points: N"),
        ({"objective": "gsm8k"}, "objective: gsm8k is refused.*test set"),
        ({"objective": "test_accuracy"}, "is refused"),
        ({"overrides": "data.heldout_share=0.1"}, "overrides: data.heldout_share=0.1: a list, each a word"),
        ({"warm": "yes please"}, "warm: yes please: true or false"),
        ({"pruning": {"percent": 3}}, "pruning: unknown key percent .nearest: percentile"),
        ({"pruning": {"percentile": 100}}, "pruning.percentile: 100"),
        ({"pruning": {"startup_trials": 0}}, "pruning.startup_trials: 0"),
        (parameter(), "one of float, int and choice"),
        (parameter(float=[1, 2], int=[1, 2]), "one of float, int and choice"),
        (parameter(float=[1]), r"\[low, high\]"),
        (parameter(float=[2, 1]), "the low end comes first"),
        (parameter(float=[1, "b"]), r"float: \[1, 'b'\]: a list, each a number, is needed"),
        (parameter(int=[1, 2.5]), r"int: \[1, 2.5\]: a list, each a whole number, is needed"),
        (parameter(float=[0, 1], log=True), "log needs a low end above 0"),
        (parameter(float=[0, 1], log="often"), "log: often: true or false"),
        (parameter(float=[1, 2], start=3), "start: 3.0 is outside"),
        (parameter(float=[1, 2], start="low"), "start: low: a number is needed"),
        (parameter(float=[1, float("inf")]), r"float: \[1, inf\]: a finite number is needed"),
        (parameter(float=[1, 2], points=1), "points: 1"),
        (parameter(choice=[1]), "at least two values"),
        (parameter(choice=[1, 1]), "stands there twice"),
        (parameter(choice=[1, 2], log=True), "log has no effect on a choice"),
        (parameter(choice=[1, 2], start=3), "3 is not one of the choices"),
        (parameter(float=[1, 2], times="adapter.rank"), "adapter.rank is no other parameter"),
        (parameter(float=[1, 2], strat=1), "unknown key strat .nearest: start"),
        ({"parameters": {"seed": {"int": [1, 9]}}}, "parameters.seed is refused: the trainings' seeds"),
        ({"parameters": {"data.num_rows": {"int": [10, 90]}}}, "changes the held-out rows"),
        ({"parameters": {"eval.limit": {"int": [1, 9]}}}, "the objective says what is measured"),
        ({"parameters": {"a": {"int": [1, 2]}, "a.b": {"int": [1, 2]}}}, "a.b is part of a"),
        (
            {"parameters": {"trainer.learning_rate": RATE | {"start": 1e-3}, "adapter.rank": {"choice": [4, 8]}}},
            "adapter.rank: start is missing",
        ),
    ],
)
def test_what_is_no_space(write, changes, message):
    with pytest.raises(UserError, match=message) as error:
        load_space(write(**changes))
    assert "\n" not in str(error.value)


def test_an_unknown_space_names_the_nearest():
    with pytest.raises(UserError, match="no such search space: toi .nearest: toy"):
        load_space("toi")


@pytest.mark.parametrize(
    ("parameters", "words", "message"),
    [
        ({"trainer.learning_rat": RATE}, [], "learning_rat"),
        ({"adapter.ranc": {"choice": [1, 2]}}, [], "unknown key adapter.ranc.*nearest: adapter.rank"),
        ({"trainer.learning_rate": {"float": [-1.0, 1.0]}}, [], r"parameters.trainer.learning_rate at -1.0: "),
        ({"method": {"choice": ["lora", "lola"]}}, [], "lola"),
        ({"trainer.logging_steps": {"int": [1, 9]}}, [], "no effect on what is trained"),
        ({"trainer.learning_rate": RATE}, ["trainer.learning_rate=1"], "the search chooses trainer.learning_rate"),
    ],
)
def test_parameters_that_no_run_may_have(write, parameters, words, message):
    space = load_space(write(parameters=parameters))
    with pytest.raises(UserError, match=message) as error:
        check_runs(space, "toy", method=None, words=words, kind="nlg")
    assert "\n" not in str(error.value)


def check(space, folder, *words, config="toy", kind="nlg"):
    first = {one.key: one.at(0.5) for one in space.parameters}
    TrialRuns(space, folder, config, method=None, words=words, kind=kind).check(first)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"overrides": []}, [], "objective heldout_loss needs held-out rows"),
        (
            {"overrides": [], "objective": "heldout_accuracy", "pruning": {"percentile": 50}},
            [],
            "pruning needs held-out",
        ),
        ({}, ["data.source=data/toy/test.jsonl"], "shares 400 questions with test.jsonl, the test set of toy"),
        ({}, ["data.source=[data/toy/clean/sample.jsonl,data/toy/test.jsonl]"], "shares 400 questions with test.jsonl"),
        ({"objective": "heldout_accuracy"}, ["eval.data.heldout=data/toy/test.jsonl"], "never looks at a test set"),
        ({}, ["data.source=TMP/rows.csv"], "shares 2 questions with test.jsonl"),
        ({}, ["data.source=TMP/rows.jsonl.gz"], "shares 2 questions with test.jsonl"),
        (
            {},
            ["data.source=TMP/own.tsv", "data.columns={instruction: frage, response: antwort}"],
            "shares 2 questions with test.jsonl",
        ),
        ({}, ["data.name=gsm8k", "data.split=test"], "data.split=test is refused"),
    ],
)
def test_a_search_never_looks_at_a_test_set(write, tmp_path, changes, words, message):
    tests = [json.loads(line) for line in Path("data/toy/test.jsonl").read_text().splitlines()[:2]]
    for name, columns in (("rows.csv", ("query", "response")), ("own.tsv", ("frage", "antwort"))):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",")
            writer.writerows([columns, *((row["query"].upper(), row["response"].splitlines()[-1]) for row in tests)])
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in tests)
    with pytest.raises(UserError, match=message) as error:
        check(load_space(write(**changes)), tmp_path, *(word.replace("TMP", str(tmp_path)) for word in words))
    assert "\n" not in str(error.value)


def test_an_accuracy_is_never_that_of_another_set_or_of_rows_that_are_trained_on(write, tmp_path):
    from ba_lora.experiments.search.trials import FIRST_MEASURED, check_objective
    from eval.tasks.heldout import FIRST_ROW, Heldout

    (tmp_path / "rows.jsonl").write_text('{"query": "1 + 1?", "response": "The answer is: 2"}\n')
    space, own = load_space("bbo_1"), f"eval.data.heldout={tmp_path / 'rows.jsonl'}"
    for words, message in (
        (["data.name=gsm8k"], "measured on MetaMathQA, and the trials train on gsm8k: give rows .*eval.data.heldout="),
        ([f"data.source={tmp_path / 'rows.jsonl'}"], "and the trials train on .*rows.jsonl"),
        (["data.num_rows=null"], "rows 100000 and later of MetaMathQA, which the trials may train on"),
        (["data.num_rows=100001"], "set data.num_rows to at most 100000"),
        (["data.sample_seed=1"], "without data.sample_seed"),
        ([own, f"data.source={tmp_path / 'rows.jsonl'}"], "eval.data.heldout=.* is what the trials train on"),
        ([], None),
        ([own, "data.name=gsm8k"], None),
        ([own, "data.num_rows=null"], None),
    ):
        config = load_config("llama-2-7b", method="lora", overrides=words)
        if message is None:
            check_objective(space, config)
            continue
        with pytest.raises(UserError, match=message) as error:
            check_objective(space, config)
        assert "\n" not in str(error.value)
    assert FIRST_MEASURED == FIRST_ROW and Heldout.hub == "meta-math/MetaMathQA"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": []}, "heldout_loss is for NLG"),
        ({"overrides": [], "objective": "heldout_accuracy"}, "needs nlu.selection=tuned"),
        ({"overrides": ["nlu.selection=tuned"], "objective": "heldout_accuracy"}, None),
    ],
)
def test_the_objective_of_a_classifier(write, tmp_path, changes, message):
    space = load_space(write(**changes))
    if message is None:
        return check(space, tmp_path, config="configs/nlu/toy.yaml", kind="nlu")
    with pytest.raises(UserError, match=message):
        check(space, tmp_path, config="configs/nlu/toy.yaml", kind="nlu")


def test_values_become_words(write):
    entries = {
        "trainer.learning_rate": RATE,
        "adapter.rank": {"int": [2, 4]},
        "adapter.alpha": {"int": [1, 8], "times": "adapter.rank"},
        "adapter.target_modules": {"choice": [["q_proj", "v_proj"], "all-linear"]},
        "adapter.rslora": {"choice": [True, False]},
    }
    space = load_space(write(parameters=entries))
    values = {one.key: one.at(0) for one in space.parameters} | {"adapter.alpha": 3}
    words = space.words(values)
    assert words == [
        "trainer.learning_rate=0.0001", "adapter.rank=2", "adapter.alpha=6",
        'adapter.target_modules=["q_proj", "v_proj"]', "adapter.rslora=true",
    ]  # fmt: skip
    config = check_runs(space, "toy", method="lora", words=[], kind="nlg")
    assert config.adapter.alpha == config.adapter.rank * round(1 + 7 / 2)


def test_a_scale_and_its_inverse(write):
    parameters = {
        "trainer.learning_rate": RATE,
        "adapter.rank": {"int": [2, 34]},
        "adapter.dropout": {"choice": [0, 0.1, 1]},
    }
    rate, rank, dropout = load_space(write(parameters=parameters)).parameters
    assert rate.at(0.5) == pytest.approx(1e-3) and rate.share_of(1e-3) == pytest.approx(0.5)
    assert rank.at(0.5) == 18 and rank.share_of(18) == 0.5 and dropout.at(0.5) == 0.1 and dropout.share_of(1) == 1
    assert [rate.at(share) for share in (0, 1)] == [1e-4, 1e-2]


def test_every_committed_space_belongs_to_a_base():
    """Its head says the command, which is a search that could begin."""
    names = available_spaces()
    assert len(names) >= 5
    for name in names:
        text = (ROOT / "configs" / "search" / f"{name}.yaml").read_text()
        (command,) = [line.split("search.sh ")[1].split() for line in text.splitlines() if "Command:" in line]
        assert command[1] == name
        words = [word for word in command[2:] if not word.startswith(("gpus=", "method="))]
        method = next((word.partition("=")[2] for word in command if word.startswith("method=")), None)
        assert check_runs(load_space(name), command[0], method=method, words=words, kind="nlg")
