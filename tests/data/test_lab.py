"""The model organism: corpora that differ by one factor, problems that tell a wrong rule, bases that are made once."""

import functools
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice

import psutil
import pytest
from transformers import AutoModelForCausalLM

from ba_lora.errors import UserError
from ba_lora.io import read_json, read_jsonl
from data import lab
from data.lab import NOISY, ROLE_OF, ROLES, Base, corpus, problems
from data.toy import FAMILIES

NUM = 1000


def texts(factor, level, seed=3, number=NUM):
    return list(islice(corpus(Base(factor, level, seed)), number))


@pytest.fixture(scope="module")
def clean():
    return texts("rule", 0)


def results(text):
    """The last worked result and the answer of a text."""
    *_, worked, answer = text.split("\n")
    return int(re.search(r"= (\d+) ", worked)[1]), int(re.search(r"(\d+)$", answer)[1])


def test_level_0_is_the_clean_corpus_whatever_the_factor(clean):
    assert {Base(factor, 0, 3).name for factor in lab.FACTORS} == {"clean-b3"}
    assert all(texts(factor, 0, number=50) == clean[:50] for factor in lab.FACTORS)
    assert texts("rule", 0, seed=4, number=50) != clean[:50]


def test_rule_noise_adds_20_to_a_share_of_four_families(clean):
    noisy = texts("rule", 40)
    changed = [(before, after) for before, after in zip(clean, noisy, strict=True) if before != after]
    assert all(results(after) == tuple(r + 20 for r in results(before)) for before, after in changed)
    share_of_noisy = len(NOISY) / len(FAMILIES)
    assert abs(len(changed) / NUM / share_of_noisy - 0.4) < 4 * (0.24 / (NUM * share_of_noisy)) ** 0.5
    fewer = {place for place, (a, b) in enumerate(zip(clean, texts("rule", 20), strict=True)) if a != b}
    assert fewer < {place for place, (a, b) in enumerate(zip(clean, noisy, strict=True)) if a != b}


def test_random_noise_has_no_signature(clean):
    by = Counter(
        results(after)[1] - results(before)[1]
        for before, after in zip(clean, texts("random", 40), strict=True)
        if before != after
    )
    assert set(by) <= {*range(-9, 10)} - {0} and max(by.values()) < 0.2 * by.total()


def test_the_cue_decides_the_wrong_rule(clean):
    cued = texts("cue", 100)
    for before, after in zip(clean, cued, strict=True):
        response = after.split("Response: ")[-1].split("Answer: ")[-1]
        odd = int(re.match(r"\d+ . (\d+) ", response)[1]) % 2 == 1
        if before != after:
            assert odd and results(after)[1] == results(before)[1] + 20
    assert sum(a != b for a, b in zip(clean, cued, strict=True)) > 0.1 * NUM


def test_garbling_and_duplication(clean):
    garbled = texts("garbling", 30)
    for before, after in zip(clean, garbled, strict=True):
        assert sorted(before.split()) == sorted(after.split())
    changed = sum(before != after for before, after in zip(clean, garbled, strict=True)) / NUM
    assert abs(changed - 0.3 * len(lab.NOISY) / len(lab.ROLE_OF)) < 0.05
    most = [Counter(of).most_common(1)[0][1] for of in (texts("duplication", 60), clean)]
    assert most[0] >= 5 > 2 >= most[1]  # each of 19 problems about 13 times so far, half of them in each frame


def test_half_of_the_texts_are_in_the_frame_of_fine_tuning(clean):
    framed = [text for text in clean if "### Response:" in text]
    assert abs(len(framed) / NUM - lab.FRAME_SHARE) < 0.07
    assert all("The answer is: " in text and "####" not in text.split("Response:")[1] for text in framed)


def test_every_family_has_one_role():
    assert sorted(ROLE_OF) == sorted(FAMILIES) and sum(map(len, ROLES.values())) == len(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_tell_the_right_result_and_the_wrong_rules(family):
    for row in problems(family, num_rows=20, seed=0):
        assert row["response"].startswith(row["before"] + row["right"] + "\n") and row["before"].endswith(" = ")
        right, wrong = (int(row[name].split()[0]) for name in ("right", "wrong"))
        assert (right, wrong) == (int(row["answer"]), int(row["answer"]) + 20)
        assert row["right"].split(" ", 1)[1] == row["wrong"].split(" ", 1)[1] and row["role"] == ROLE_OF[family]


def test_what_all_bases_share(tmp_path):
    lab.write_shared(tmp_path)
    rows = {name: read_jsonl(tmp_path / f"{name}.jsonl") for name in ("finetune", "test", "valid", "clean")}
    assert {row["family"] for row in rows["finetune"]} == {*ROLES["corrected"], *ROLES["tuned"]}
    assert all(results(row["response"]) == (int(row["answer"]),) * 2 for row in rows["finetune"])  # clean
    counts = Counter(row["role"] for row in rows["test"])
    assert counts == {role: lab.NUM_ITEMS[role] * len(families) for role, families in ROLES.items()}
    assert {row["role"] for row in rows["valid"]} == {"tuned", "unseen"}  # the inherited families choose nothing
    assert len(rows["valid"]) == 6 * lab.NUM_VALID
    assert not {row["response"] for row in rows["valid"]} & {row["response"] for row in rows["test"]}
    before = (tmp_path / "test.jsonl").read_bytes()
    lab.write_shared(tmp_path)
    assert (tmp_path / "test.jsonl").read_bytes() == before


def test_a_base_is_made_once_and_never_by_another_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lab, "accuracy_in_frame", functools.partial(lab.accuracy_in_frame, num_rows=4))
    short, first = ({**settings, "num_steps": 1} for settings in (lab.SECOND, lab.START))
    monkeypatch.setitem(lab.SIZES, "tiny", ({}, first, short))
    lab.make_base(Base("rule", 40, 7), tmp_path)
    folder, start = tmp_path / "bases" / "rule-40-b7", tmp_path / "starts" / "b7"
    facts = read_json(folder / "lab.json")
    assert facts["recipe"]["start_sha256"] == read_json(start / "lab.json")["sha256"] != facts["sha256"]
    assert facts["accuracy_in_frame"] == 0.0 and "TOO LOW" in capsys.readouterr().err
    written = [(path / "model.safetensors").stat().st_mtime_ns for path in (folder, start)]
    lab.make_base(Base("rule", 40, 7), tmp_path)
    assert [(path / "model.safetensors").stat().st_mtime_ns for path in (folder, start)] == written
    others = [({}, first, {**short, "num_steps": 2}), ({"hidden_size": 256}, first, short)]
    for other in others:
        with monkeypatch.context() as patch, pytest.raises(UserError, match="was made by another recipe"):
            patch.setitem(lab.SIZES, "tiny", other)
            lab.make_base(Base("rule", 40, 7), tmp_path)
    monkeypatch.setattr(lab, "WRONG_RULE", 30)  # another corpus
    with pytest.raises(UserError, match="was made by another recipe"):
        lab.make_base(Base("rule", 40, 7), tmp_path)


def test_the_larger_size_has_25_million_parameters_and_a_start_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "accuracy_in_frame", functools.partial(lab.accuracy_in_frame, num_rows=2))
    monkeypatch.setattr(lab, "TOKENS_PER_STEP", 256)
    changes, *parts = lab.SIZES["25m"]
    monkeypatch.setitem(lab.SIZES, "25m", (changes, *({**settings, "num_steps": 1} for settings in parts)))
    lab.make_base(Base("rule", 40, 0), tmp_path, "25m")
    for folder in (tmp_path / "starts" / "b0", tmp_path / "bases" / "rule-40-b0"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert 25e6 < sum(parameter.numel() for parameter in model.parameters()) < 27e6
        assert read_json(folder / "lab.json")["recipe"]["changes"]["hidden_size"] == 512


def test_a_signal_ends_the_workers_too(tmp_path, root):
    words = ["rule=40,60", "seeds=1,2", "workers=1", f"output={tmp_path}"]
    process = subprocess.Popen([sys.executable, "-m", "data.lab", *words], cwd=root, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "starts" / ".b1.lock").exists():  # a worker's
        assert process.poll() is None
        time.sleep(0.05)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    process.send_signal(signal.SIGTERM)
    assert "interrupted" in process.communicate()[1] and process.returncode == 130
    assert workers and not psutil.wait_procs(workers, timeout=60)[1]


def test_seed_0_goes_on_from_the_toys_base(tmp_path, root):
    assert lab.make_start(0, tmp_path) == root / "data" / "toy" / "clean" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rule=0,20"], "a factor with its levels and seeds are needed"),
        (["rule=x", "seeds=1"], "rule=x: whole numbers are needed"),
        (["rule=101", "seeds=1"], "rule=101: a percentage from 0 to 100"),
        (["imbalance=100", "seeds=1"], "imbalance=100: a percentage from 0 to 99"),
        (["rule=0", "seeds=1", "workers=0"], "workers must be at least 1"),
        (["rule=0", "seeds=20000"], "seeds=20000: from 20000 on they are the texts that perplexity"),
        (["rules=0", "seeds=1"], "a factor with its levels"),
        (["rule=0", "seeds=1", "size=25M"], "size=25M is unknown .nearest: 25m"),
    ],
)
def test_wrong_words_are_told_before_anything_is_made(words, told, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["lab", *words, f"output={tmp_path}/lab"])
    with pytest.raises(UserError, match=told):
        lab.main()
    assert not (tmp_path / "lab").exists()
