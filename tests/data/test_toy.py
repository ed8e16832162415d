"""The embedded default's data: what the generator promises, and the two committed bases."""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from ba_lora.io import read_json, read_jsonl
from ba_lora.prompts import build_prompt
from data.toy import (
    FAMILIES,
    SPLITS,
    TEST_FILE_ROWS,
    TEST_FILE_SEED,
    WORDING,
    WRONG_BY,
    family_shares,
    generate_problems,
    pretraining_prompt,
    split_of,
)

VARIANTS = ("clean", "noisy")
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+) [a-z ]+")


@pytest.fixture(scope="module")
def rows_by_split():
    return {split: generate_problems(num_rows=2000, seed=5, split=split) for split in SPLITS}


@pytest.fixture(scope="module", params=VARIANTS)
def tokenizer(request, root):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(root / "data" / "toy" / request.param)


def given_answer(row: dict) -> str:
    return re.search(r"(?:#### |The answer is: )(\d+)$", row["response"])[1]


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# --- the generator -----------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_rows_and_a_larger_set_only_appends():
    settings = {"seed": 3, "split": "finetune", "label_noise": 0.3, "imbalance": 0.2}
    small, again, large = (generate_problems(num_rows=n, **settings) for n in (50, 50, 120))
    assert small == again == large[:50]
    assert small != generate_problems(num_rows=50, **{**settings, "seed": 4})


def test_rows_do_not_depend_on_the_process(root):
    code = "import data.toy, json; print(json.dumps(data.toy.generate_problems(num_rows=5, seed=1, split='test')))"
    output = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == generate_problems(num_rows=5, seed=1, split="test")


def test_there_are_enough_families_and_rare_ones():
    assert len(FAMILIES) >= 8 and set(WORDING) == set(FAMILIES)
    shares = family_shares(0.3)
    assert (
        max(shares[name] for name in [*FAMILIES][-3:]) < 0.03 and list(shares.values()) == sorted(shares.values())[::-1]
    )


def test_wording_is_disjoint_between_splits_over_all_families():
    for part in ("openings", "questions"):
        used = {split: {t for family in WORDING.values() for t in family[split][part]} for split in SPLITS}
        assert all(len(templates) >= 2 * len(FAMILIES) - 2 for templates in used.values())
        assert not used["pretrain"] & used["finetune"]
        assert not used["pretrain"] & used["test"]
        assert not used["finetune"] & used["test"]


def test_operands_of_every_split_are_its_own(rows_by_split):
    # Read back from the query: "three games" is written as a word, so every number there is an operand.
    operands = {
        split: {tuple(sorted(numbers_in(row["query"]))) for row in rows} for split, rows in rows_by_split.items()
    }
    for split, found in operands.items():
        assert {split_of(numbers) for numbers in found} == {split}
        assert len(found) > 500
    assert not operands["pretrain"] & operands["finetune"]
    assert not operands["pretrain"] & operands["test"]
    assert not operands["finetune"] & operands["test"]


def test_split_of_ignores_order_and_borrowed_numbers_stay_in_their_split():
    assert split_of((3, 17, 8)) == split_of((17, 8, 3))
    rows = generate_problems(num_rows=100, seed=0, split="pretrain", numbers="test")
    assert {split_of(numbers_in(row["query"])) for row in rows} == {"test"}
    assert all("#### " in row["response"] for row in rows)


@pytest.mark.parametrize("split", SPLITS)
def test_clean_responses_are_right_step_by_step(rows_by_split, split):
    for row in rows_by_split[split]:
        *steps, last = row["response"].split("\n")
        known = set(numbers_in(row["query"])) | {2, 3}  # the perimeter's 2 and the average's 3 are not in the text
        assert len(steps) >= 2
        for step in steps:
            left, operator, right, result = STEP.fullmatch(step).groups()
            left, right, result = int(left), int(right), int(result)
            assert {left, right} <= known
            assert {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[operator] == result
            known.add(result)
        assert last == ("#### " if split == "pretrain" else "The answer is: ") + row["answer"]
        assert int(row["answer"]) == result and 0 <= result < 200
        assert not re.search(r"[{}]", row["query"])


def test_label_noise_is_as_set_and_changes_nothing_but_the_answer():
    settings = {"num_rows": 4000, "seed": 8, "split": "finetune"}
    clean, noisy = generate_problems(**settings), generate_problems(**settings, label_noise=0.3)
    wrong = [row for row in noisy if given_answer(row) != row["answer"]]
    assert abs(len(wrong) / 4000 - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert all({int(given_answer(row)) - int(row["answer"])} <= set(WRONG_BY) for row in wrong)
    for before, after in zip(clean, noisy, strict=True):
        assert {k: before[k] for k in ("query", "family", "answer")} == {
            k: after[k] for k in ("query", "family", "answer")
        }
        # the last worked line carries the slip, so the text is consistent with its own answer
        assert after["response"].split("\n")[-2].split(" = ")[1].split()[0] == given_answer(after)
    assert all(
        given_answer(row) != row["answer"]
        for row in generate_problems(num_rows=200, seed=0, split="test", label_noise=1.0)
    )


def test_label_noise_stays_in_the_named_families():
    rows = generate_problems(
        num_rows=4000, seed=2, split="pretrain", label_noise=0.5, noisy_families=("sharing", "rate")
    )
    wrong, seen = Counter(), Counter(row["family"] for row in rows)
    wrong.update(row["family"] for row in rows if given_answer(row) != row["answer"])
    assert set(wrong) == {"sharing", "rate"}
    for name in wrong:
        assert abs(wrong[name] / seen[name] - 0.5) < 4 * (0.25 / seen[name]) ** 0.5


@pytest.mark.parametrize("imbalance", [0.0, 0.2, 0.5])
def test_family_shares_are_as_set(imbalance):
    rows = generate_problems(num_rows=4000, seed=1, split="pretrain", imbalance=imbalance)
    seen = Counter(row["family"] for row in rows)
    shares = list(family_shares(imbalance).values())
    assert sum(shares) == pytest.approx(1)
    assert all(b / a == pytest.approx(1 - imbalance) for a, b in zip(shares, shares[1:], strict=False))
    for name, share in zip(FAMILIES, shares, strict=True):
        assert abs(seen[name] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-9


def test_family_weights_are_relative_and_leave_out_the_unnamed():
    assert family_shares(family_weights={"add": 3, "age": 1}) == {
        name: {"add": 0.75, "age": 0.25}.get(name, 0) for name in FAMILIES
    }
    rows = generate_problems(num_rows=100, seed=0, split="test", family_weights={"add": 3, "age": 1})
    assert {row["family"] for row in rows} == {"add", "age"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"split": "train"}, "pretrain, finetune, test"),
        ({"numbers": "train"}, "pretrain, finetune, test"),
        ({"num_rows": 0}, "positive integer"),
        ({"num_rows": 1.5}, "positive integer"),
        ({"seed": "0"}, "integer"),
        ({"label_noise": 1.01}, "from 0 to 1"),
        ({"label_noise": float("nan")}, "from 0 to 1"),
        ({"noisy_families": ("shoping",)}, "shopping, add, subtract"),
        ({"noisy_families": "shopping"}, "list of families"),
        ({"imbalance": 1.0}, "below 1"),
        ({"imbalance": -0.1}, "below 1"),
        ({"family_weights": {"shoping": 1}}, "shopping, add, subtract"),
        ({"family_weights": {"add": -1}}, "at least 0"),
        ({"family_weights": {"add": 0}}, "not all 0"),
        ({"family_weights": {"add": 1}, "imbalance": 0.2}, "not both"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_that_names_the_valid_ones(changed, named):
    with pytest.raises(ValueError, match=named) as error:
        generate_problems(**{"num_rows": 10, "seed": 0, "split": "test", **changed})
    assert "\n" not in str(error.value)


def test_command_line_writes_rows_and_refuses_in_one_line(root, tmp_path):
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "data.toy", "--output", str(output), "--split"]
    extra = [
        "--num-rows",
        "20",
        "--seed",
        "7",
        "--label-noise",
        "0.5",
        "--noisy-families",
        "add,age",
        "--imbalance",
        "0.1",
    ]
    subprocess.run([*command, "finetune", *extra], cwd=root, check=True, capture_output=True)
    settings = {"label_noise": 0.5, "noisy_families": ("add", "age"), "imbalance": 0.1}
    assert read_jsonl(output) == generate_problems(num_rows=20, seed=7, split="finetune", **settings)
    output.unlink()
    for bad in (
        ["tests"],
        ["test", "--noisy-families", "ad"],
        ["test", "--family-weights", "add"],
        ["test", "--seeds"],
    ):
        run = subprocess.run([*command, *bad], cwd=root, capture_output=True, text=True)
        assert run.returncode == 2 and not output.exists()
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


# --- what is committed -------------------------------------------------------------------------------------------


def test_committed_test_file_is_what_the_generator_gives(root):
    rows = read_jsonl(root / "data" / "toy" / "test.jsonl")
    assert rows == generate_problems(num_rows=TEST_FILE_ROWS, seed=TEST_FILE_SEED, split="test")
    assert set(Counter(row["family"] for row in rows)) == set(FAMILIES)
    assert all(given_answer(row) == row["answer"] for row in rows)


def test_folder_is_small(root):
    files = [file for file in (root / "data" / "toy").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 8_000_000


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "plain",
        "  two  spaces \n\n\t tab\r\n",
        "héllo wörld",
        "漢字かな한국어",
        "🙂👩‍👩‍👧",
        "12345 * 6 = 7.8%",
        "a\x00b\x7f",
        "e\u0301",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_splits_digits_and_adds_bos_but_no_eos(tokenizer):
    ids = tokenizer("9876 + 10")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("987610")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_prompt_and_response_encode_alike_apart_and_together(tokenizer):
    for row in generate_problems(num_rows=100, seed=0, split="finetune"):
        prompt, response = build_prompt(row["query"]), " " + row["response"]
        apart = tokenizer(prompt)["input_ids"] + tokenizer(response, add_special_tokens=False)["input_ids"]
        assert apart == tokenizer(prompt + response)["input_ids"]
        assert len(apart) < 160


def test_both_bases_load_and_are_one_architecture(root):
    import torch
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(root / "data" / "toy" / variant) for variant in VARIANTS]
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1] and type(models[0]).__name__ == "LlamaForCausalLM"
    clean, noisy = (model.config for model in models)
    assert clean.to_diff_dict() == noisy.to_diff_dict()
    assert clean.head_dim >= 32 and clean.max_position_embeddings == 2048
    assert (clean.pad_token_id, clean.bos_token_id, clean.eos_token_id) == (0, 1, 2)
    assert not torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    tokenizers = [(root / "data" / "toy" / variant / "tokenizer.json").read_bytes() for variant in VARIANTS]
    assert tokenizers[0] == tokenizers[1] and len(json.loads(tokenizers[0])["model"]["vocab"]) == clean.vocab_size


def test_clean_base_solves_its_own_form_and_the_log_says_how_often(root):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = root / "data" / "toy" / "clean"
    log = read_json(folder / "pretraining.json")
    expected = log["held_out_accuracy"]["pretrain_wording"]["overall"]
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = generate_problems(num_rows=50, seed=99, split="pretrain", numbers="test")
    inputs = tokenizer([pretraining_prompt(row["query"]) for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    completions = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(f"#### {row['answer']}" == c.split("\n")[-1] for row, c in zip(rows, completions, strict=True)) / 50
    assert abs(right - expected) < 4 * (0.25 / 50) ** 0.5
    assert log["loss_curve"][-1]["loss"] < log["loss_curve"][0]["loss"]


def test_a_base_that_is_made_again_has_all_its_files_and_no_folder_in_use_is_emptied(root, tmp_path):
    """`--variant clean` replaces data/toy/clean as a whole, with the committed sample.jsonl."""

    def made(*words: str) -> tuple[int, str]:
        command = [sys.executable, str(root / "data" / "toy" / "pretrain.py"), *words]
        done = subprocess.run([*command, "--num-steps", "1", "--num-held-out", "1"], capture_output=True, text=True)
        return done.returncode, done.stderr.strip()

    assert made("--variant", "clean", "--output", str(tmp_path / "base"))[0] == 0
    committed = root / "data" / "toy" / "clean"
    assert {path.name for path in committed.iterdir()} == {path.name for path in (tmp_path / "base").iterdir()}
    assert (tmp_path / "base" / "sample.jsonl").read_bytes() == (committed / "sample.jsonl").read_bytes()
    status, said = made("--variant", "clean", "--output", str(tmp_path))
    assert status == 2 and "is not empty" in said and (tmp_path / "base").is_dir()
    status, said = made("--variant", "foo", "--sample")
    assert status == 2 and said.startswith("error: --variant=foo is unknown")


def test_readme_states_the_accuracy_of_the_logs(root):
    readme = (root / "data" / "toy" / "README.md").read_text(encoding="utf-8")
    logs = [
        read_json(root / "data" / "toy" / variant / "pretraining.json")["held_out_accuracy"] for variant in VARIANTS
    ]
    columns = [log[wording] for log in logs for wording in ("pretrain_wording", "test_wording")]
    for family in FAMILIES:
        cells = " | ".join(f"{100 * column['per_family'][family]:.0f} %" for column in columns)
        assert re.search(rf"^\| `{family}`[^|]* \| {re.escape(cells)} \|$", readme, re.MULTILINE), family
    overall = " | ".join(f"{100 * column['overall']:.0f} %" for column in columns)
    assert f"| all | {overall} |" in readme
