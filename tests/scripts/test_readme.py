"""The README's commands run as they stand, and its tables hold no number that is not in a file."""

import csv
import importlib
import json
import os
import re
import shlex
import subprocess
import time
from statistics import mean, stdev

import pytest

from ba_lora.config.layers import load_config
from ba_lora.experiments.tables import available_tables
from tests.conftest import ROOT
from tests.support.committed import committed_text

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.S) for line in block.splitlines() if line.strip()
]
LAUNCHES = [line for line in COMMANDS if re.search(r"scripts/(ba-lora|lora|pissa|full-ft)\.sh", line)]
BY_HAND = [line for line in COMMANDS if "outputs/by-hand" in line]
NLU = [line for line in COMMANDS if "scripts/nlu.sh" in line]
TRAIN_NLU = [line for line in COMMANDS if "train_nlu.py" in line]
REPRODUCE = [line for line in COMMANDS if "scripts/reproduce.sh" in line]
OF_RUNS = [line for line in COMMANDS if "outputs/RUN_ID" in line]  # run as they stand by tests/eval/test_eval_nlu.py
TOY = [line for line in LAUNCHES if "configs/nlg/toy.yaml" in line or line.endswith("ba-lora.sh")]


def shell(line, timeout_s=3600):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["HF_HUB_OFFLINE"] = "1"
    return subprocess.run(
        ["sh", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def test_every_command_is_of_a_kind_that_is_tested_here():
    assert len(LAUNCHES) >= 9 and len(BY_HAND) == 3 and len(TOY) == 4
    assert len(NLU) >= 4
    assert TRAIN_NLU == [".venv/bin/python train_nlu.py --config configs/nlu/bert-large.yaml --task sst2"]
    assert len(REPRODUCE) >= 4
    tested = {*LAUNCHES, *BY_HAND, *NLU, *TRAIN_NLU, *REPRODUCE, *OF_RUNS}
    assert sorted({*COMMANDS} - tested) == ["sh scripts/test.sh"]


@pytest.fixture
def dry_run(capsys, monkeypatch):
    """Call what a line's script calls, with --dry-run, in this process (a start of Python takes seconds); return what
    it prints."""

    def run(line):
        words = shlex.split(line.removesuffix("--dry-run"))
        while "=" in words[0]:
            monkeypatch.setenv(*words.pop(0).split("=", 1))
        assert words[0] == "sh"
        text, given = (ROOT / words[1]).read_text(), ""
        if inner := re.search(r'^exec sh .*/(\S+\.sh"?)(.*) "\$@"$', text, flags=re.M):  # a script over another one
            text, given = (ROOT / "scripts" / inner[1].strip('"')).read_text(), inner[2]
        module, own = re.search(r'python" -m (\S+)(.*) "\$@"$', text, flags=re.M).groups()
        own += given
        monkeypatch.setattr("sys.argv", [module, *shlex.split(own), *words[2:], "--dry-run"])
        monkeypatch.chdir(ROOT)
        assert importlib.import_module(module).main() == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("line", ["ba-lora.sh", "nlu.sh", "reproduce.sh ranks"])
def test_scripts_start(line):
    done = shell(f"sh scripts/{line} --dry-run")
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("line", LAUNCHES)
def test_every_launch_resolves_to_its_commands(line, dry_run):
    """Config, method, overrides, launcher and tasks are checked; a 7B model is not trained."""
    training, *evaluation = [shlex.split(printed) for printed in dry_run(line).splitlines()]
    assert "train_nlg.py" in training and len(evaluation) >= 2
    assert ("accelerate.commands.launch" in training) == ("NUM_MACHINES" in line)


@pytest.mark.parametrize("line", NLU)
def test_every_nlu_launch_resolves_to_its_commands(line, dry_run):
    trainings = [shlex.split(printed) for printed in dry_run(line).splitlines()]
    assert len(trainings) == 3 and all("train_nlu.py" in training for training in trainings)


@pytest.mark.parametrize("line", REPRODUCE)
def test_every_table_command_is_understood(line, dry_run):
    name = shlex.split(line)[2]
    assert re.search(rf"^{name}: \d+ cells from \d+ runs: ", dry_run(line), flags=re.M)


def test_the_library_example_trains(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(example.replace("outputs/library", str(tmp_path)), names)
    losses = [entry["task"] for entry in names["trainer"].state.log_history if "task" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_every_table_is_in_the_list_of_tables():
    text = (ROOT / "REPRODUCTION.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| [^|]+ \| `(\w+)` \|", text, flags=re.M)
    assert sorted(listed) == available_tables()


def test_the_nlu_training_command_resolves():
    words = shlex.split(TRAIN_NLU[0])
    config = load_config(words[3], task=words[5], kind="nlu")
    assert (config.name, config.nlu.task, config.method) == ("bert-large", "sst2", "ba_lora")


@pytest.mark.slow
def test_the_nlu_default_compares_the_methods_in_three_minutes():
    """LoRA, PiSSA and BA-LoRA, each better than guessing one of three classes; then printed again, not retrained."""
    started = time.monotonic()
    done = shell("sh scripts/nlu.sh overwrite=true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - started < 180
    again = shell("sh scripts/nlu.sh")
    assert again.returncode == 0 and again.stdout.count("is trained already") == 3
    table = done.stdout[done.stdout.index("method ") :].splitlines()
    assert again.stdout.splitlines()[-len(table) :] == table
    scores = {line.split()[0]: float(line.split()[4]) for line in table[2:5]}
    assert set(scores) == {"lora", "pissa", "ba_lora"} and min(scores.values()) > 50


@pytest.mark.slow
@pytest.mark.parametrize("line", TOY)
def test_toy_commands_run_as_they_stand(line):
    done = shell(line)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "strict" in done.stdout and "result: results/runs/toy-" in done.stdout


@pytest.mark.slow
def test_the_stages_by_hand_run_as_they_stand():
    for line in BY_HAND:
        done = shell(line)
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["metrics"]["strict"] > 0.2


def test_files_and_folders_it_names_exist():
    named = re.findall(r"`((?:configs|scripts|ba_lora|data|eval|results|tests)/[\w./-]+)`", TEXT)
    assert len(named) > 10
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_papers_numbers_are_those_of_the_csv():
    rows = list(csv.DictReader(open(ROOT / "results" / "paper_reported" / "nlg_main.csv", encoding="utf-8")))
    known = {(row["model"], row["method"], row["task"]): f"{row['mean']} ± {row['std']}" for row in rows}
    printed = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TEXT.splitlines()
        if re.match(r"\| (llama|mistral|gemma)", line)
    ]
    assert len(printed) == 12
    for model, method, *cells in printed:
        wanted = [known[model, method, task] for task in ("gsm8k", "math", "humaneval", "mbpp", "mt_bench")]
        assert cells[0::2] == wanted and set(cells[1::2]) == {""}


def test_the_toys_numbers_are_those_of_the_results():
    """Mean ± standard deviation (n − 1) over the committed runs of each method."""
    printed = {
        cells[0]: cells[1:]
        for line in TEXT.splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] in ("untuned", "ba_lora")
    }
    assert set(printed) == {"untuned", "ba_lora"}
    results = [json.loads(path.read_text()) for path in (ROOT / "results" / "default" / "runs").glob("toy-*.json")]
    for method, cells in printed.items():
        scores = [100 * r["evaluation"]["toy"]["metrics"]["strict"] for r in results if _of_the_table(r, method)]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        assert cells[:2] == [f"{mean(scores):.1f}{spread}", str(len(scores))]


def test_the_toy_table_is_an_extract_of_its_report():
    """Mean ± standard deviation; perplexity before and after in one cell."""
    methods = {
        "not tuned": "untuned",
        "Full FT": "full_ft",
        "LoRA": "lora",
        "LoRA + all three terms": "lora_ba",
        "PiSSA": "pissa",
        "BA-LoRA (2024)": "ba_lora",
        "BA-LoRA (ICLR 2026)": "ba_lora_iclr2026",
    }
    cells = {
        (cell["method"], cell["setting"], cell["column"]): cell
        for cell in json.loads(committed_text("results/toy/table.json"))["cells"]
    }

    def shown(method, base, column, decimals):
        cell = cells[method, f"base={base}", column]
        spread = "" if cell["std"] is None else f" ± {cell['std']:.{decimals}f}"
        lost = sum(failure["status"] == "collapsed" for failure in cell["failures"])
        spread += f" ({lost} of {cell['planned']} collapsed)" if lost else ""
        return f"{cell['mean']:.{decimals}f}{spread}"

    printed = re.findall(r"^\| (clean|noisy) \| ([^|]+) \| (.*) \|$", TEXT, flags=re.M)
    assert [row[:2] for row in printed] == [(base, label) for base in ("clean", "noisy") for label in methods]
    for base, label, row in printed:
        before, after = (shown(methods[label], base, column, 2) for column in ("ppl_before", "ppl_after"))
        wanted = [shown(methods[label], base, column, 1) for column in ("strict", "flexible", "rare", "noisy")]
        wanted += [f"{before.split()[0]} → {after}", shown(methods[label], base, "distinct_2", 1)]
        assert row.split(" | ") == wanted, (base, label)


def test_what_the_toy_says_is_what_its_comparisons_say():
    """BA-LoRA (ICLR 2026) against PiSSA, clean and noisy base: differences and intervals."""
    comparisons = json.loads(committed_text("results/toy/table.json"))["comparisons"]
    found = {
        (one["column"], one["focus"]["setting"]): one
        for one in comparisons
        if (one["focus"]["method"], one["other"]["method"]) == ("ba_lora_iclr2026", "pissa")
    }

    def told(column, base, decimals, sign=""):
        one = found[column, f"base={base}"]
        numbers = [f"{one['difference']:+.{decimals}f}", *(f"{one[k]:{sign}.{decimals}f}" for k in ("low", "high"))]
        return "{}, {} to {}".format(*numbers).replace("-", "−")

    text = " ".join(TEXT.split())
    assert f"perplexity {told('ppl_after', 'clean', 2)}, clean base; {told('ppl_after', 'noisy', 2)}, noisy" in text
    assert f"distinct-2 {told('distinct_2', 'noisy', 1)}; clean {told('distinct_2', 'clean', 1)}" in text
    by_seed = ", ".join(f"{value:+.2f}".replace("-", "−") for value in found["strict", "base=clean"]["by_seed"])
    clean, noisy = (told("strict", base, 1).replace(", ", " (") for base in ("clean", "noisy"))
    assert f"{clean}; by seed {by_seed}) and {noisy})" in text
    of_2024 = [one for one in comparisons if (one["focus"]["method"], one["other"]["method"]) == ("ba_lora", "pissa")]
    assert all(one["low"] <= 0 <= one["high"] and abs(one["difference"]) <= 0.5 for one in of_2024)
    assert len(comparisons) == 72 and not any(one["p"] for one in comparisons)


def test_reproduction_opens_with_the_verdict_that_the_report_wrote():
    """Copied from results/toy/table.md, five lines."""
    lines = json.loads(committed_text("results/toy/table.json"))["verdict"]
    opening = (ROOT / "REPRODUCTION.md").read_text(encoding="utf-8").split("## ")[0]
    assert len(lines) == 5 and [line[2:] for line in opening.splitlines() if line.startswith("- ")] == lines
    assert committed_text("results/toy/table.md").splitlines()[2:7] == [f"- {line}" for line in lines]


def test_what_the_page_on_statistics_says_is_what_was_simulated():
    lines = json.loads((ROOT / "docs" / "statistics.json").read_text())["lines"]
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    of_4 = [line for line in lines if (line["metric"], line["seed_sd"]) == ("accuracy", 4.0)]
    for name, key in (("false marks, seeds and items", "false"), ("false marks, items alone", "false_items_alone")):
        [row] = [line for line in text.splitlines() if line.startswith(f"| {name}")]
        shown = [float(cell.strip(" %")) for cell in row.split("|")[2:5]]
        assert shown == pytest.approx([100 * line[key] for line in of_4], abs=0.06)
    assert max(line["false"] for line in lines) <= 0.06


def test_the_price_of_a_step_is_that_of_the_newest_bench_rows():
    newest = {}
    for row in csv.DictReader(committed_text("results/bench.csv").splitlines()):
        if (row["device"], row["shape"]) == ("cpu", "default"):
            newest[row["case"], row["vocab"]] = (
                f"{float(row['step_ratio']):.2f}",
                f"{float(row['memory_ratio']):.2f}",
            )
    names = {"official arithmetic": "official", "fused": "fused", "fused, reference cached": "fused_cache"}
    for name, case in names.items():
        (line,) = re.findall(rf"^\| BA-LoRA, {name} \|(.*)\|$", TEXT, flags=re.M)
        assert tuple(cell.strip() for cell in line.split("|")) == newest[case, "32000"] + newest[case, "128000"], name


def _of_the_table(result, method):
    from ba_lora.config.layers import load_config
    from ba_lora.config.schema import training_hash

    if method == "untuned":
        return result["method"] == "untuned" and result["config"]["model"]["name"] == "data/toy/clean"
    config = load_config(ROOT / "configs" / "nlg" / "toy.yaml", method=method, overrides=[f"seed={result['seed']}"])
    return result["method"] == method and result["run_id"].endswith(training_hash(config))
