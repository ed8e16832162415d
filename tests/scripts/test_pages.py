"""The commands of all pages run, and their tables hold no number that is not in a file."""

import csv
import dataclasses
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml

from ba_lora.config.layers import load_config
from ba_lora.config.registries import facts, parts
from ba_lora.errors import INCOMPLETE, UserError
from ba_lora.experiments.tables import available_tables, find_table, load_table
from ba_lora.io import write_jsonl_atomic
from ba_lora.runs import convert, results_nlu
from data import lab_nlu, show
from eval import chat, compare, generate, harness, score
from eval.report import __main__ as report
from eval.report import simulation
from eval.report.hypotheses import level_of
from eval.report.sources import Sources
from eval.report.spec import table_spec
from eval.report.table import build_table
from scripts import bench
from tests.conftest import ROOT
from tests.runs.test_results_nlu import result as nlu_result
from tests.support.committed import committed_paths, committed_text
from tests.support.page_world import toy_run
from tests.support.pages import COMMANDS, PAGES, blocks, commands, example

README, RESULTS = PAGES["README.md"], PAGES["docs/results.md"]
LAUNCHES = [line for line in COMMANDS if re.search(r"scripts/(ba-lora|lora|pissa|full-ft)\.sh", line)]
OF_EXAMPLES = [  # of files in docs/adding.md
    line for line in COMMANDS if re.search(r"z_loss|lora_attention|yes_no|two_ranks|executor=polite", line)
]
DRY = [line for line in LAUNCHES if line not in OF_EXAMPLES]
BY_HAND = [line for line in COMMANDS if "outputs/by-hand" in line]
NLU = [line for line in COMMANDS if "scripts/nlu.sh" in line]
SUBMIT = [line for line in COMMANDS if "scripts/slurm/submit.sh" in line]
TRAIN_NLU = [line for line in COMMANDS if "train_nlu.py" in line]
SEARCH = [line for line in COMMANDS if "scripts/search.sh" in line]
REPRODUCE = [line for line in COMMANDS if "scripts/reproduce.sh" in line and line not in OF_EXAMPLES]
TOY = [
    line for line in commands("README.md") if line in DRY and ("nlg/toy.yaml" in line or line.endswith("ba-lora.sh"))
]
OF_RUNS = [line for line in COMMANDS if "outputs/RUN_ID" in line]  # run as they are by tests/eval/test_eval_nlu.py
SCORE = [line for line in COMMANDS if "-m eval.score" in line and line not in (*BY_HAND, *OF_EXAMPLES)]
GENERATE = [line for line in COMMANDS if "-m eval.generate" in line and line not in (*BY_HAND, *OF_EXAMPLES)]
REPORT = [line for line in COMMANDS if "python -m eval.report toy " in line or "eval.report.simulation" in line]
PAGE = [line for line in COMMANDS if re.search(r"eval\.report --runs|eval\.compare", line)]
CHAT = [line for line in COMMANDS if "eval.chat" in line]
INSPECT = [line for line in COMMANDS if ".cache/inspect" in line]
BENCH = [line for line in COMMANDS if "scripts/bench.py" in line]
OVER_SEEDS = [line for line in COMMANDS if "ba_lora.runs.results_nlu" in line]
HARNESS = [line for line in COMMANDS if "scripts/harness.sh" in line]
SHOW = [line for line in COMMANDS if "-m data.show" in line]
CONVERT = [line for line in COMMANDS if "ba_lora.runs.convert" in line]
EVAL_OWN = [line for line in COMMANDS if "outputs/RUN_OWN" in line]  # run by tests/data/test_own_task.py
SITE = [line for line in COMMANDS if ".cache/docs" in line]
LAB = [line for line in COMMANDS if "-m data.lab_nlu" in line]
JUDGE = [line for line in COMMANDS if line.startswith("export JUDGE_MODEL=")]


def shell(line, timeout_s=3600):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["HF_HUB_OFFLINE"] = "1"
    return subprocess.run(
        ["sh", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def test_every_command_is_of_a_kind_that_is_tested_here():
    assert len(DRY) >= 12 and len(OF_EXAMPLES) == 6 and len(BY_HAND) == 3 and len(TOY) == 2
    assert len(NLU) >= 6 and len(TRAIN_NLU) == 1 and len(REPRODUCE) >= 5
    assert len(SCORE) == 4 and len(GENERATE) == len(OVER_SEEDS) == len(JUDGE) == 1 and len(OF_RUNS) == len(BENCH) == 2
    assert len(HARNESS) == len(CONVERT) == len(SITE) == 3 and len(SHOW) == len(EVAL_OWN) == len(REPORT) == 1
    assert len(PAGE) == 2 and len(CHAT) == 1 and len(INSPECT) == 4 and len(SEARCH) >= 4
    tested = {
        *LAUNCHES,
        *OF_EXAMPLES,
        *BY_HAND,
        *NLU,
        *TRAIN_NLU,
        *REPRODUCE,
        *OF_RUNS,
        *SCORE,
        *GENERATE,
        *REPORT,
        *BENCH,
    }
    tested |= {*OVER_SEEDS, *HARNESS, *SITE, *JUDGE, *SHOW, *CONVERT, *EVAL_OWN, *PAGE, *CHAT, *INSPECT, *SEARCH}
    tested |= {*SUBMIT, *LAB}
    left = ["sh scripts/slurm/install.sh", *(f"sh scripts/test.sh{word}" for word in ("", " gpu", " slow"))]
    assert len(SUBMIT) == 1 and sorted({*COMMANDS} - tested) == left


def test_no_command_hides_in_a_block_of_another_kind():
    for page, text in PAGES.items():
        languages = {*re.findall(r"^ *```(\w+)", text, flags=re.M)}
        assert languages <= {"sh", "text", "python", "yaml", "json"}, page


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 220


@pytest.fixture
def dry_run(capsys, monkeypatch, tmp_path):
    """Call what a line's script calls, with --dry-run, in this process (a start of Python takes seconds); return what
    it prints."""

    monkeypatch.setenv("SEED", "1")
    monkeypatch.setenv("GLUE", "glue")
    (tmp_path / "test.jsonl").write_text('{"question": "2 + 2?", "answer": "#### 4"}\n')  # the user's own test set

    def run(line):
        line = os.path.expandvars(line).replace("=test.jsonl", f"={tmp_path}/test.jsonl")
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


@pytest.mark.parametrize("line", DRY)
def test_every_launch_resolves_to_its_commands(line, dry_run):
    """Config, method, overrides, launcher and tasks are checked; a 7B model is not trained."""
    training, *evaluation = [shlex.split(printed) for printed in dry_run(line).splitlines()]
    assert "train_nlg.py" in training and (len(evaluation) >= 2 or "eval.tasks=[]" in line)
    assert ("accelerate.commands.launch" in training) == ("NUM_MACHINES" in line)


@pytest.mark.parametrize("line", SUBMIT)
def test_every_submission_is_a_run_and_a_job(line, dry_run, tmp_path):
    """What it checks before it asks sbatch, and what sbatch is given."""
    words = line[line.index("sh scripts") :].replace("slurm/submit.sh", "ba-lora.sh")
    assert "train_nlg.py" in dry_run(words)
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    text = (ROOT / "scripts/slurm/submit.sh").read_text().replace('sh "$ROOT/scripts/ba-lora.sh"', ": sh")
    script = tmp_path / "repository" / "scripts" / "slurm" / "submit.sh"
    script.parent.mkdir(parents=True)
    script.write_text(text)
    done = shell(f"PATH={tmp_path}:$PATH; " + line.replace("scripts/slurm/submit.sh", str(script)))
    given = done.stdout.splitlines()
    assert given[:2] == ["--nodes=2", "--gpus-per-node=8"] and given[-2:] == shlex.split(line)[-2:]
    outer = "GPUS_PER_NODE=0 CPUS_PER_NODE=16 SLURM_ARRAY_JOB_ID=7 SLURM_CONF=/etc/slurm.conf"
    (tmp_path / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@" "${SLURM_ARRAY_JOB_ID-none}" "$SLURM_CONF"\n')
    on_cpus = shell(f"PATH={tmp_path}:$PATH; {outer} sh {script} CONFIG").stdout.splitlines()
    assert on_cpus[:2] == ["--nodes=1", "--cpus-per-task=16"] and on_cpus[-2:] == ["none", "/etc/slurm.conf"]
    refused = subprocess.run(
        ["sh", script, "CONFIG"], capture_output=True, text=True, env=os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    assert refused.returncode == 2 and "error: how many GPUs? GPUS_PER_NODE=8" in refused.stderr
    assert given[-3].endswith("scripts/slurm/train.sbatch") and (ROOT / "scripts/slurm/train.sbatch").is_file()


@pytest.mark.parametrize("line", NLU)
def test_every_nlu_launch_resolves_to_its_commands(line, dry_run):
    stages = [shlex.split(printed) for printed in dry_run(line).splitlines()]
    trainings = [stage for stage in stages if "eval.nlu" not in stage]  # the example's sets out of its domain
    methods = re.search(r"method=(\S+)", line)
    assert len(trainings) == (len(methods[1].split(",")) if methods else 3)
    assert all("train_nlu.py" in training for training in trainings)


@pytest.mark.parametrize("line", REPRODUCE)
def test_every_table_command_is_understood(line, dry_run):
    name = shlex.split(line)[2]
    assert re.search(rf"^{name}: \d+ cells from \d+ runs: ", dry_run(line), flags=re.M)


def test_the_bases_of_classifiers_as_the_page_tells(tmp_path, monkeypatch):
    rows = [{"sentence": f"a {word} {i}", "label": i % 2} for i in range(60) for word in ("film", "movie", "play")]
    for name in ("train", "validation"):
        write_jsonl_atomic(tmp_path / "sst2" / f"{name}.jsonl", rows)
    monkeypatch.setenv("GLUE", str(tmp_path))
    (line,) = LAB
    asked = []
    monkeypatch.setattr(lab_nlu, "call_all", lambda calls, workers: asked.extend(calls))
    monkeypatch.setattr(lab_nlu.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", [*shlex.split(os.path.expandvars(line))[2:], f"output={tmp_path}"])
    lab_nlu.main()
    assert len(asked) == 5 + 15 and asked[0][1].task == "sst2"


@pytest.mark.parametrize("line", SEARCH)
def test_every_search_command_is_understood(line, dry_run):
    told = dry_run(line).splitlines()
    assert len(told) in (2, 12, 18) and re.search(r": \d+ trials by \w+, 1 training\(s\) each$", told[0])
    assert all("train_nlg.py" in p and ("accelerate" in p) == ("gpus=4" in line) for p in told[1::2])


def test_the_library_example_trains(tmp_path, monkeypatch):
    script, mixin = blocks(PAGES["docs/library.md"], "python")
    monkeypatch.chdir(ROOT)
    names = {}
    exec(script.replace("outputs/library", str(tmp_path)), names)
    losses = [entry["task"] for entry in names["trainer"].state.log_history if "task" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    exec(mixin, names)
    kind = names["OwnTrainer"]
    assert issubclass(kind, names["Trainer"]) and kind.compute_loss is names["BALoRALoss"].compute_loss


def test_scoring_as_the_pages_tell(tmp_path, monkeypatch, capsys):
    """Completions, a file of one's own, a folder of runs; MT-Bench without its questions says what is missing."""
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    rows = [json.loads(line) for line in (ROOT / "data" / "toy" / "test.jsonl").read_text().splitlines()]
    answers = [f"The answer is: {row['answer']}" for row in rows]
    run = tmp_path / "RUN"
    (run / "completions").mkdir(parents=True)
    own = [{"question": row["query"], "answer": f"#### {row['answer']}"} for row in rows[:5]]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    for task, texts in (("toy", answers), ("gsm8k", answers[:5]), ("mt_bench", answers)):
        lines = [json.dumps({"task_id": f"{task}/{i}", "completion": text}) + "\n" for i, text in enumerate(texts)]
        (run / "completions" / f"{task}.jsonl").write_text("".join(lines))
    places = {"outputs/RUN": run, "test.jsonl": tmp_path / "test.jsonl", "--runs outputs": f"--runs {tmp_path}/none"}
    done = []
    for line in SCORE:
        words = " ".join(line.split()[3:])
        for name, place in places.items():
            words = words.replace(name, str(place))
        if "mt_bench" in line or "--runs" in line:
            with pytest.raises(UserError, match=r"--data|none"):
                score.main(words.split())
            continue
        assert score.main(words.split()) == 0
        done.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [(one["task"], one["metrics"]["strict"]) for one in done] == [("toy", 1.0), ("gsm8k", 1.0)]


def test_generating_as_the_pages_tell(tmp_path, tiny_model):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "2 + 2?", "answer": "#### 4"}) + "\n")
    (line,) = GENERATE
    line = line.replace("outputs/RUN", str(tiny_model)).replace("test.jsonl", str(tmp_path / "test.jsonl"))
    words = line.split()[3:]
    generate.main([*words, "--engine", "hf", "--output", str(tmp_path), "max_new_tokens=4"])
    (line,) = (tmp_path / "gsm8k.jsonl").read_text().splitlines()
    assert json.loads(line)["task_id"] == "gsm8k/0"


@pytest.mark.slow
def test_the_toys_report_follows_from_the_committed_runs(tmp_path):
    (line,) = REPORT
    done = shell(line.replace("outputs/toy-report", str(tmp_path)))
    assert done.returncode in (0, INCOMPLETE), done.stderr[-3000:]  # 0 where outputs/ has the runs' answers
    assert (tmp_path / "page" / "index.html").is_file()
    made, committed = (
        json.loads((tmp_path / "table.json").read_text()),
        json.loads(committed_text("results/toy/table.json")),
    )
    assert [cell["mean"] for cell in made["cells"]] == [cell["mean"] for cell in committed["cells"]]


def test_the_page_of_runs_as_the_pages_tell(tmp_path, monkeypatch):
    for name in ("RUN", "OTHER_RUN"):
        toy_run(tmp_path / name, "lora", len(name), completion=lambda place, gold: gold, items=5)
    monkeypatch.setattr(report, "PROJECT_ROOT", tmp_path / "project")
    monkeypatch.setattr(compare, "PROJECT_ROOT", tmp_path / "project")
    for line in PAGE:
        words = line.replace("outputs/RUN", f"{tmp_path}/RUN").replace("outputs/OTHER_RUN", f"{tmp_path}/OTHER_RUN")
        words = words.replace("--runs outputs", f"--runs {tmp_path}").replace(
            "=outputs/", f"={tmp_path}/project/outputs/"
        )
        monkeypatch.setattr("sys.argv", words.split()[2:])
        assert (report if "eval.report" in line else compare).main() == 0
    made = [path.parent.name for path in tmp_path.glob("project/outputs/*/index.html")]
    assert sorted(made) == ["compare", "page"]


def test_asking_as_the_page_tells(tmp_path, tiny_model, monkeypatch, capsys):
    (tmp_path / "other").symlink_to(tiny_model)
    line = CHAT[0].replace("outputs/RUN", str(tiny_model)).replace("outputs/OTHER_RUN", str(tmp_path / "other"))
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2 + 3?\n"))
    assert chat.main([*line.split()[3:], "max_new_tokens=3"]) == 0
    assert "[other]" in capsys.readouterr().out


def test_logs_for_inspect_take_the_environment_that_the_page_tells(root):
    """Made and read by tests/eval/page/test_inspect_logs.py in such an environment."""
    pinned = re.search(r"inspect-ai==[\d.]+", (root / "pyproject.toml").read_text())[0]
    assert INSPECT[2].endswith(pinned) and INSPECT[3].split()[2:4] == ["eval.report", "--inspect"]


def test_the_bench_knows_its_words():
    """Every case of every shape is run by tests/scripts/test_bench.py."""
    for line in BENCH:
        options = dict(zip(words := shlex.split(line)[2:], words[1:], strict=False))
        assert options["--device"] == "cpu" and options.get("--shape", "default") in bench.SHAPES


def test_a_table_over_seeds_as_the_page_tells(tmp_path, monkeypatch, capsys):
    for seed in (1, 2):
        file = tmp_path / f"minilm-sst2-{seed}.json"
        file.write_text(json.dumps(nlu_result("lora", seed, 0.8, 0.8, None)))
    (pattern,) = shlex.split(OVER_SEEDS[0])[3:]
    monkeypatch.setattr("sys.argv", ["results_nlu", *map(str, sorted(tmp_path.glob(Path(pattern).name)))])
    results_nlu.main()
    assert "80.00" in capsys.readouterr().out


def test_the_harness_understands_the_words_of_the_pages():
    for line in HARNESS:
        asked = harness.read_words(shlex.split(line)[2:])
        assert asked.model.endswith("outputs/RUN") and asked.tasks and set(asked.files) <= set(asked.tasks)


@pytest.mark.slow
def test_the_harness_has_its_environment_and_the_tasks():
    """Its environment is made once, in .cache; most tasks' rows are the hub's: they are looked up and not run."""
    done = shell("sh scripts/harness.sh --setup")
    assert done.returncode == 0, done.stderr[-3000:]
    for line in HARNESS:
        harness.check([word for word in shlex.split(line.partition(" --data")[0])[2:]])
    with pytest.raises(UserError, match="has no task mmluu .nearest: mmlu"):
        harness.check(["outputs/RUN", "mmluu"])


def test_the_rows_are_shown_as_the_page_tells(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["show", *shlex.split(SHOW[0])[3:]])
    assert show.main() == 0
    text = capsys.readouterr().out
    assert "410 used" in text and text.count("tokens, ") == 3 and "### System:" in text


@pytest.mark.parametrize("line", CONVERT)
def test_the_verbs_of_the_pages_are_understood(line, monkeypatch):
    """They are run by tests/runs/test_convert.py."""
    called = []
    for verb in ("convert", "merge_adapter", "compare_models"):
        monkeypatch.setattr(convert, verb, lambda *words, **more: called.append(words) or {"max_difference": 0})
    monkeypatch.setattr("sys.argv", ["convert", *shlex.split(line)[3:]])
    assert convert.main() == 0 and len(called) == 1


def test_the_sites_requirements_are_exact_pins():
    lines = (ROOT / "docs" / "requirements.txt").read_text().splitlines()
    assert len(lines) > 20 and all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+|", line) for line in lines)


@pytest.mark.slow
def test_the_site_builds_without_a_warning():
    """Its environment is made once, in .cache, and again when a pin changes."""
    make, install, build = SITE
    environment, pins = ROOT / ".cache" / "docs", (ROOT / "docs" / "requirements.txt").read_text()
    stamp = environment / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != pins:
        for line in (make, install):
            done = shell(line)
            assert done.returncode == 0, done.stderr[-3000:]
        stamp.write_text(pins)
    done = shell(build)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    pages = [path.name for path in (ROOT / "docs").glob("*.md")] + ["index.md", "reproduction.md"]
    site = ROOT / ".cache" / "site"
    for page in pages:
        assert (site / page.removesuffix(".md") / "index.html").is_file() or page == "index.md", page
    assert "BALoRATrainer" in (site / "library" / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def copied(tmp_path):
    """Make a copy of the tree with examples of docs/adding.md in it; return what runs a Python command there."""

    def copy(*titles):
        for name in ("ba_lora", "configs", "data", "eval"):
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "train_nlg.py", tmp_path)
        for title in titles:
            (tmp_path / title).write_text(example("docs/adding.md", title))
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}

        def run(*words):
            done = subprocess.run(
                [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        return run

    return copy


IN_THE_LIBRARY = """
from pathlib import Path
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainingArguments
from ba_lora import BALoRAConfig, BALoRATrainer, export_lora
from ba_lora.config.layers import load_config
from ba_lora.methods.build import build_model

config = load_config("configs/nlg/toy.yaml", method="pissa", overrides=["adapter.init=first_rows"])
model, _ = build_model(config, run_path=Path("built"), num_steps=2)
row = {"input_ids": [*range(3, 15)], "labels": [-100] * 6 + [*range(9, 15)], "attention_mask": [1] * 12}
settings = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
args = TrainingArguments("trained", max_steps=2, learning_rate=1e-2, logging_steps=1, **settings)
terms = BALoRAConfig(lambda_consistency=0.1)
trainer = BALoRATrainer(model, args, regularizers=terms, train_dataset=Dataset.from_list([row] * 8))
trainer.train()
ids = torch.tensor([row["input_ids"]])
with torch.no_grad():
    trained = trainer.plain_model().eval()(ids).logits
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    first = base(ids).logits
    loaded = PeftModel.from_pretrained(base, export_lora(trainer, "exported")).eval()
    print(abs(loaded(ids).logits - trained).max().item(), abs(first - trained).max().item())
"""


@pytest.mark.slow
def test_the_example_of_an_init_trains(copied, tmp_path):
    """Under BA-LoRA's terms, so that the reference is asked for; by the command and by the library."""
    run = copied("ba_lora/methods/first_rows.py")
    words = ["adapter.init=first_rows", "trainer.max_steps=2", "trainer.logging_steps=1", "data.num_rows=32"]
    words += [f"output_dir={tmp_path / 'run'}"]
    run("train_nlg.py", "--config", "configs/nlg/toy.yaml", "--method", "ba_lora", *words, f"results_dir={tmp_path}")
    assert (tmp_path / "run" / "lora" / "adapter_config.json").is_file()  # checked against the trained model
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert 0 <= next(entry["consistency"] for entry in log if "consistency" in entry) < 0.1
    difference, change = map(float, run("-c", IN_THE_LIBRARY).split()[-2:])
    assert difference < 1e-3 < 0.1 < change


def test_the_examples_of_a_method_a_task_and_a_table_work(copied, tmp_path):
    """As docs/adding.md tells."""
    run = copied("configs/methods/lora_attention.yaml", "eval/tasks/yes_no.py", "configs/tables/two_ranks.yaml")
    registry, line = tmp_path / "eval" / "tasks" / "__init__.py", example("docs/adding.md", "eval/tasks/__init__.py")
    registry.write_text(registry.read_text().replace("_WHERE = {\n", "_WHERE = {\n" + line))
    (tmp_path / "rows.jsonl").write_text('{"question": "Is 2 even?", "answer": "yes"}\n')
    (tmp_path / "said.jsonl").write_text('{"task_id": "yes_no/0", "completion": "Yes, it is."}\n')

    [line] = [line for line in OF_EXAMPLES if "lora_attention" in line]
    assert "train_nlg.py" in run("-m", "ba_lora.experiments.pipeline", *shlex.split(line)[2:], "--dry-run")
    assert "8 cells from 8 runs" in run("-m", "ba_lora.experiments.grid", "two_ranks", "--dry-run")
    said = run("-m", "eval.score", "--task", "yes_no", "--completions", "said.jsonl", "--data", "rows.jsonl")
    assert json.loads(said.splitlines()[-1])["metrics"]["strict"] == 1.0


def test_the_methods_that_deepspeed_cannot_run_are_those_of_the_page():
    """Each part by its name, as written there without signs; and no other one."""
    told = PAGES["docs/methods.md"].partition("Refused under DeepSpeed: ")[2].replace("-", "").lower()
    everywhere, of_zero3 = told.split("refused under zero3 only: ")
    named = {name: facts(kind, name) for kind in ("tuner", "init", "optimizer") for name in parts(kind)}
    for name, found in named.items():
        word = "virtual tokens" if name in ("prompt", "prefix") else name.replace("_", "")
        assert bool(re.search(rf"\b{word}\b", everywhere)) == bool(found["no_deepspeed"]), name
        assert bool(re.search(rf"\b{word}\b", of_zero3)) == bool(found["no_zero3"] or found["needs_rows"]), name


def test_every_table_is_in_the_list_of_tables():
    listed = re.findall(r"^\| [^|]+ \| `(\w+)` \|", PAGES["docs/tables.md"], flags=re.M)
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


@pytest.mark.parametrize("page", PAGES)
def test_files_and_folders_it_names_exist(page):
    for path in re.findall(r"`((?:configs|scripts|ba_lora|data|eval|results|tests)/[\w./-]+)`", PAGES[page]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_its_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.is_file(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_papers_numbers_are_those_of_the_csv():
    rows = list(csv.DictReader(open(ROOT / "results" / "paper_reported" / "nlg_main.csv", encoding="utf-8")))
    known = {(row["model"], row["method"], row["task"]): f"{row['mean']} ± {row['std']}" for row in rows}
    printed = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in RESULTS.splitlines()
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
        for line in README.splitlines()
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

    printed = re.findall(r"^\| (clean|noisy) \| ([^|]+) \| (.*) \|$", RESULTS, flags=re.M)
    assert [row[:2] for row in printed] == [(base, label) for base in ("clean", "noisy") for label in methods]
    for base, label, row in printed:
        before, after = (shown(methods[label], base, column, 2) for column in ("ppl_before", "ppl_after"))
        wanted = [shown(methods[label], base, column, 1) for column in ("strict", "flexible", "rare", "noisy")]
        wanted += [f"{before.split()[0]} → {after}", shown(methods[label], base, "distinct_2", 1)]
        assert row.split(" | ") == wanted, (base, label)


def test_what_the_toy_says_is_what_its_comparisons_say():
    """BA-LoRA (ICLR 2026) against PiSSA, clean and noisy base: differences, intervals, seeds."""
    comparisons = json.loads(committed_text("results/toy/table.json"))["comparisons"]
    found = {
        (one["column"], one["focus"]["setting"]): one
        for one in comparisons
        if (one["focus"]["method"], one["other"]["method"]) == ("ba_lora_iclr2026", "pissa")
    }

    def told(name, base, decimals):
        one = found[name, f"base={base}"]
        low, high = (f"{one[key]:.{decimals}f}" for key in ("low", "high"))
        return f"{one['difference']:+.{decimals}f} ({low} to {high})"

    def cells(label):
        (row,) = re.findall(rf"^ *\| {re.escape(label)} \|(.*)\|$", RESULTS, flags=re.M)
        return [cell.strip().replace("−", "-") for cell in row.split("|")]

    for label, name, decimals in (("perplexity after", "ppl_after", 2), ("distinct-2 (%)", "distinct_2", 1)):
        assert cells(label) == [told(name, base, decimals) for base in ("clean", "noisy")]
    assert cells("strict (%)") == [told("strict", base, 1) for base in ("clean", "noisy")]
    by_seed = [found["strict", f"base={base}"]["by_seed"] for base in ("clean", "noisy")]
    assert cells("strict (%), seeds 42, 1, 2") == [", ".join(f"{value:+.2f}" for value in values) for values in by_seed]
    of_2024 = [one for one in comparisons if (one["focus"]["method"], one["other"]["method"]) == ("ba_lora", "pissa")]
    assert all(one["low"] <= 0 <= one["high"] and abs(one["difference"]) <= 0.5 for one in of_2024)
    assert len(comparisons) == 72 and not any(one["p"] for one in comparisons)


def _cells(row):
    return [cell.strip(" *").replace("−", "-") for cell in row.strip().strip("|").split("|")]


# Table → where the page tells what it found, its number of hypotheses, and of means at the highest noise.
INHERITANCE = {
    "inheritance": ("## Results", 7, 7),
    "inheritance_rate": ("## At one learning rate", 2, 3),
    "inheritance_nlu": ("## The twin's results", 7, 7),
    "inheritance_nlu_rate": ("## The twin at one learning rate", 2, 4),
    "inheritance_nlu_lora": ("## The twin's LoRA at higher rates", 4, 2),
}
DECISIONS = {  # what stands behind "refuted", by the interval and the margin
    "above 0": lambda low, high, margin: low > 0 and high > margin,
    "within ± 1": lambda low, high, margin: margin == 1 and -1 <= low and high <= 1,
    "below 0": lambda low, high, margin: high < 0 and low < -margin,
}


def _hypotheses(table):
    return {
        one["hypothesis"]["name"]: one
        for one in json.loads(committed_text(f"results/{table}/table.json"))["hypotheses"]
    }


def _effect(one):
    return f"{one['difference']:+.2f}", f"{one['low']:+.2f} to {one['high']:+.2f}"


@pytest.mark.parametrize("table", INHERITANCE)
def test_what_is_inherited_is_what_the_reports_found(table):
    """Each hypothesis with its interval and decision, and the means at the highest noise."""
    section, num_hypotheses, num_means = INHERITANCE[table]
    told = PAGES["docs/inheritance.md"].partition(section + "\n")[2].partition("\n## ")[0]
    tables = [[_cells(line) for line in part.splitlines()] for part in told.split("\n\n") if part.startswith("|")]
    (effects,) = [rows for header, _, *rows in tables if "95 % interval" in header]
    ((head, rows),) = [(header, rows) for header, _, *rows in tables if header[1].startswith("p(wrong rule)")]
    found = _hypotheses(table)
    assert len(found) == num_hypotheses
    shown = {name.partition(":")[0]: cells for name, *cells in effects}
    for name, one in found.items():
        effect, interval, decision = shown[name]
        assert (effect, interval) == _effect(one) and decision.startswith(one["decision"])
        for reason, holds in DECISIONS.items():
            assert reason not in decision or holds(one["low"], one["high"], one["hypothesis"]["margin"]), name
        by_holm = re.search(r"Holm (0\.\d+)", decision)
        assert by_holm or one["p_adjusted"] is None, name
        assert not by_holm or float(by_holm[1]) == pytest.approx(one["p_adjusted"], abs=0.0005)
        if one["guard"] is not None and one["hypothesis"]["primary"]:
            guards = " ".join(told.replace("−", "-").partition("The guard, ")[2].partition("\n\n")[0].split())
            ((missed, value),) = re.findall(rf"(not )?kept by [^.;]*?{name} \((-?[\d.]+)\)", guards)
            assert value == f"{one['guard']:.2f}"
            assert bool(missed) == (one["guard"] < -one["hypothesis"]["guard"]["margin"])
    report = committed_text(f"results/{table}/table.md").partition("## Means over the pre-trained models\n")[2]
    (header, _, *lines) = [_cells(line) for line in report.partition("\n## ")[0].splitlines() if line.startswith("|")]
    means = {  # a method, or a method and its learning rate
        ", ".join([method, *re.findall("rate=(.*) ", level)]): dict(zip(header[2:], cells, strict=True))
        for level, method, *cells in lines
        if level.endswith("noise=40")
    }
    assert len({row[0] for row in rows}) == num_means
    for method, *texts in rows:
        for column, text in zip(head[1:], texts, strict=True):
            (cell,) = [cell for name, cell in means[method].items() if name.startswith(column)]
            numbers = re.findall(r"[\d.]+", text)
            assert numbers, (method, column)
            exact_ones = re.findall(r"[\d.]+", cell)  # more: the spread, which the page may leave out, and n
            for number, exact in zip(numbers, exact_ones, strict=False):
                decimals = len(number.partition(".")[2])
                assert abs(float(number) - float(exact)) <= 0.51 * 10**-decimals, (method, column)


def test_the_first_hypothesis_follows_from_the_committed_runs(monkeypatch):
    """By the models only: the grades of items are not committed."""
    monkeypatch.setattr(Sources, "grades", lambda *_: None)
    spec = table_spec(load_table(find_table("inheritance")))
    [h1] = [one for one in spec.hypotheses if one.name == "H1"]
    levels = {row for row in spec.rows if row.method in h1.arms and level_of(row, spec.clusters) in h1.levels}
    runs = {key: of for key, of in spec.runs.items() if key[0] in levels and key[1] in (h1.column, h1.guard.column)}
    columns = tuple(spec.column(name) for name in (h1.column, h1.guard.column))
    rows = tuple(row for row in spec.rows if row in levels)
    spec = dataclasses.replace(spec, rows=rows, columns=columns, runs=runs, hypotheses=(h1,))
    (one,) = build_table(spec, report.read_sources(spec, command="")).findings
    committed = _hypotheses("inheritance")["H1"]
    assert (one.difference, one.guard) == pytest.approx((committed["difference"], committed["guard"]))
    assert (one.low, one.high) == pytest.approx((-0.97, 0.08), abs=0.005)
    assert one.num_clusters == (5, 5) and one.num_items is None and one.decision == committed["decision"]
    told = " ".join(PAGES["docs/inheritance.md"].split()).replace("−", "-")
    assert f"{_effect(dataclasses.asdict(one))[0]} ({_effect(dataclasses.asdict(one))[1]}) by the models only" in told


def test_the_committed_reports_tell_what_was_declared_and_when():
    paths = [path for path in committed_paths("results") if path.endswith("/declared.json")]
    assert len(paths) >= 14
    for path in paths:
        declared, made = (
            json.loads(committed_text(f"{path.rpartition('/')[0]}/{name}.json")) for name in ("declared", "table")
        )
        for told in filter(None, (made["declaration"], made["standing"])):
            assert declared["sha256"][:12] in told, path
            assert not declared["num_results"] or f"{declared['num_results']} results were there" in told, path
        assert made["standing"] in committed_text(f"{path.rpartition('/')[0]}/table.md")


def test_the_committed_reports_tell_what_the_seed_moves():
    """A base of the twin brings its head; the one of the NLU default has none."""
    texts = {table: committed_text(f"results/{table}/table.md") for table in ("methods_nlu_toy", *INHERITANCE)}
    assert [table for table, text in texts.items() if "initialisation of the head" in text] == ["methods_nlu_toy"]
    assert all("dropout of the encoder" in text for table, text in texts.items() if "nlu" in table)


def test_the_first_pages_tell_what_the_reports_on_inheritance_found():
    found, of_rate = _hypotheses("inheritance"), _hypotheses("inheritance_rate")
    twin, at_one_rate = _hypotheses("inheritance_nlu"), _hypotheses("inheritance_nlu_rate")
    assert {one["decision"] for one in at_one_rate.values()} == {"undecided"}
    of_the_rate = f"{twin['H1']['difference'] - at_one_rate['At 2.5e-4']['difference']:.2f} of it"
    assert of_the_rate in PAGES["README.md"] and of_the_rate in PAGES["REPRODUCTION.md"]
    everywhere = [_effect(found["H1"]), _effect(of_rate["All terms"]), _effect(twin["H1"])]
    further = [*everywhere, _effect(found["H2"]), *map(_effect, at_one_rate.values())]
    told = {
        "README.md": everywhere,
        "REPRODUCTION.md": further,
        "docs/results.md": [
            *further,
            _effect(_hypotheses("inheritance_nlu_lora")["Full FT, 4.0e-3"]),
            *(_effect(one[name]) for one, name in ((found, "H3"), (found, "H4"), (twin, "H2"), (twin, "H5"))),
        ],
    }
    for page, effects in told.items():
        text = " ".join(PAGES[page].replace("−", "-").split())
        for effect, interval in effects:
            assert re.search(rf"{re.escape(effect)}( points)? \((95 % )?{re.escape(interval)}", text), (page, effect)


def test_the_page_on_results_has_every_method_of_its_table():
    cells = json.loads(committed_text("results/methods_nlu_toy/table.json"))["cells"]
    labels = load_table(find_table("methods_nlu_toy")).labels
    found = {(labels[cell["method"]], cell["column"]): cell for cell in cells}
    chosen = yaml.safe_load(committed_text("results/methods_nlu_toy_tuning/chosen.yaml"))
    rates = {labels[method]: float(words[0].partition("=")[2]) for method, words in chosen.items()}
    told = PAGES["docs/results.md"].partition("## Every method on the NLU default\n")[2].partition("\n## ")[0]
    (header, _, *rows) = [_cells(line) for line in told.splitlines() if line.startswith("|")]
    assert {row[0] for row in rows} == rates.keys() and len(rows) == 31
    for name, rate, *shown in rows:
        accuracy, parameters, seconds, memory = (
            found[name, column] for column in ("accuracy", "parameters", "seconds", "memory")
        )
        assert float(rate) == rates[name]
        assert shown == [
            f"{accuracy['mean']:.1f} ± {accuracy['std']:.1f}",
            f"{parameters['mean']:.2f}",
            f"{seconds['mean']:.0f}",
            f"{memory['mean']:.0f}",
        ]
    means = [float(row[2].split()[0]) for row in rows]
    assert means == sorted(means, reverse=True)


def test_the_page_on_results_has_the_tests_and_edges_of_the_methods_on_the_nlu_default():
    report = json.loads(committed_text("results/methods_nlu_toy/table.json"))
    told = PAGES["docs/results.md"].partition("## Every method on the NLU default\n")[2].partition("\n## ")[0]
    text = " ".join(told.split())
    by_method = {}
    for one in report["comparisons"]:
        if one["column"] == "accuracy":
            decided = (one["difference"] > 0) - (one["difference"] < 0) if one["is_significant"] else 0
            by_method.setdefault(one["other"]["method"], set()).add(decided)
    assert set.union(*by_method.values()) == {0, 1}  # "behind no method by a corrected test"
    ahead = {method for method, decided in by_method.items() if decided == {1}}
    assert ahead == {"adalora", "dylora", "peanut", "nmtune", "bitfit", "lorta"}
    assert "ahead of six: AdaLoRA, DyLoRA, NEAT, NMTune, BitFit and LoRTA" in text

    chosen = yaml.safe_load(committed_text("results/methods_nlu_toy_tuning/chosen.yaml"))
    rates = {}
    for row in yaml.safe_load(committed_text("configs/tables/methods_nlu_toy_tuning.yaml"))["rows"]:
        rates |= {
            method: [float(setting.partition("=")[2]) for setting in row["settings"]] for method in row["methods"]
        }
    at = {
        place: {m for m, words in chosen.items() if float(words[0].partition("=")[2]) == rates[m][place]}
        for place in (0, -1)
    }
    assert at[-1] == {"lora_fa", "loha", "adalora", "houlsby", "pfeiffer", "vera"} and at[0] == {"lora_pro", "nmtune"}
    assert (
        "LoRA-FA, LoHa, AdaLoRA, Houlsby, Pfeiffer and VeRA at the highest rate, LoRA-Pro and NMTune at the lowest"
        in text
    )
    tuning = json.loads(committed_text("results/methods_nlu_toy_tuning/table.json"))["cells"]
    found = [f"{c['mean']:.1f} %" for c in tuning if (c["method"], c["column"]) == ("nmtune", "heldout")]
    assert set(found[1:]) == {found[-1]}
    assert f"it has {found[0]} of the held-out rows at the lowest rate, {found[-1]} at each other." in text


def test_the_page_on_results_has_every_method_on_the_nlg_toy():
    report = json.loads(committed_text("results/methods_toy/table.json"))
    labels = load_table(find_table("methods_toy")).labels
    found = {(labels[cell["method"]], cell["column"]): cell for cell in report["cells"]}
    assert all(cell["n"] == cell["planned"] == 5 for cell in report["cells"])
    chosen = yaml.safe_load(committed_text("results/methods_toy_tuning/chosen.yaml"))
    rates = {labels[method]: float(words[0].partition("=")[2]) for method, words in chosen.items()}
    told = PAGES["docs/results.md"].partition("## Every method on the NLG toy\n")[2].partition("\n## ")[0]
    (header, _, *rows) = [_cells(line) for line in told.splitlines() if line.startswith("|")]
    assert {row[0] for row in rows} == rates.keys() and len(rows) == 32
    for name, rate, *shown in rows:
        assert float(rate) == rates[name]
        spread = [(found[name, column], places) for column, places in (("inside", 1), ("outside", 1), ("ppl_after", 2))]
        wanted = [f"{cell['mean']:.{places}f} ± {cell['std']:.{places}f}" for cell, places in spread]
        parameters, seconds, memory = (found[name, column]["mean"] for column in ("parameters", "seconds", "memory"))
        assert shown == [*wanted, f"{parameters / 1000:.1f}", f"{seconds:.0f}", f"{memory:.0f}"], name
    means = [float(row[2].split()[0]) for row in rows]
    assert means == sorted(means, reverse=True)

    text = " ".join(told.replace("−", "-").split())
    behind = {"ba_lora": 0, "ba_lora_iclr2026": 0}
    ahead = set()
    for one in (one for one in report["comparisons"] if one["column"] == "inside"):
        behind[one["focus"]["method"]] += one["high"] < 0
        ahead |= {one["other"]["method"]} if one["low"] > 0 else set()
        if one["other"]["method"] in ("pissa", "lora"):
            shown = "{:+.2f} ({:+.2f} to {:+.2f}".format(*(one[key] for key in ("difference", "low", "high")))
            p = one["p_adjusted"]
            assert (f"{shown}; p {p:.2f}" if p >= 0.001 else shown) in text and (p >= 0.001 or "p < 0.001 both" in text)
    assert f"behind {behind['ba_lora']} (2024) and {behind['ba_lora_iclr2026']} (ICLR 2026) of the 30 others" in text
    assert ahead == {"ia3", "lorta", "prompt_tuning", "prefix_tuning"}
    assert {one["family"] for one in report["comparisons"]} == {"exploratory"}
    (drift,) = [
        one
        for one in report["comparisons"]
        if (one["column"], one["focus"]["method"], one["other"]["method"]) == ("ppl_after", "ba_lora_iclr2026", "pissa")
    ]
    assert "{:+.2f} ({:+.2f} to {:+.2f})".format(*(drift[key] for key in ("difference", "low", "high"))) in text
    dylora = sorted((value for value in found["DyLoRA", "inside"]["values"] if value), reverse=True)
    assert "DyLoRA solves {:.1f} and {:.1f} % with two seeds and nothing with three".format(*dylora) in text
    assert "(IA)³, LoRTA and both kinds of virtual tokens solve next to nothing" in text
    inside = {cell["method"]: cell["mean"] for cell in report["cells"] if cell["column"] == "inside"}
    assert {method for method, mean in inside.items() if mean < 5} == ahead


TERMS = ("consistency", "diversity", "svd")


def test_the_page_on_lambda_has_the_intervals_of_its_sweep():
    """Each is told as "lower by": of PiSSA minus the row."""
    report = json.loads(committed_text("results/lambda_toy/table.json"))
    found = {(one["focus"]["method"], one["focus"]["setting"], one["column"]): one for one in report["comparisons"]}
    text = " ".join(PAGES["docs/lambda.md"].replace("−", "-").split())

    def told(method, share, column, decimals):
        one = found[method, share, column]
        shown = [f"{-one[key] + 0.0:.{decimals}f}" for key in ("difference", "high", "low")]
        return "{} ({} to {})".format(*shown)

    for share in ("share=0.01", "share=0.03", "share=0.1"):
        for method in ("ba_lora", "ba_lora_iclr2026"):
            assert told(method, share, "ppl_after", 2) in text, (method, share)
    assert told("ba_lora", "published", "ppl_after", 3) in text
    assert told("ba_lora_iclr2026", "published", "ppl_after", 2) in text
    assert told("ba_lora", "share=0.3", "flexible", 1).replace(" (", " of flexible accuracy (") in text
    assert told("ba_lora_iclr2026", "share=0.3", "strict", 1).replace(" (", " points (") in text
    assert told("ba_lora", "share=0.3", "strict", 0).replace(" (", " points of strict accuracy (") in text
    small = ("published", *(f"share={share}" for share in (0.003, 0.01, 0.03, 0.1)))
    up_to_10 = [one for (_, share, column), one in found.items() if column != "ppl_after" and share in small]
    assert len(up_to_10) == 20 and all(one["low"] < 0 < one["high"] for one in up_to_10)
    strict = [one["high"] - one["low"] for one in up_to_10 if one["column"] == "strict"]
    assert 16.5 < min(strict) and max(strict) < 21.5
    kl = {(cell["method"], cell["setting"]): cell["values"] for cell in report["cells"] if cell["column"] == "kl"}
    for method in ("ba_lora", "ba_lora_iclr2026"):
        steps = [kl[method, f"share={share}"] for share in (0, 0.003, 0.01, 0.03, 0.1, 0.3, 1)]
        for by_seed in zip(*steps, strict=True):
            assert list(by_seed) == sorted(by_seed, reverse=True), method


def test_the_page_on_lambda_has_the_means_of_its_sweep():
    cells = json.loads(committed_text("results/lambda_toy/table.json"))["cells"]
    found = {(cell["method"], cell["setting"], cell["column"]): cell for cell in cells}
    methods = {"2024": ["ba_lora"], "ICLR 2026": ["ba_lora_iclr2026"], "none (PiSSA)": ["ba_lora", "ba_lora_iclr2026"]}
    settings = {"as published": "published", "0": "share=0"}
    seen = set()
    for line in PAGES["docs/lambda.md"].splitlines():
        terms, share, *numbers, weights = [*_cells(line), *6 * [""]][:6]
        if terms not in methods:
            continue
        setting = settings.get(share) or f"share={float(share.removesuffix(' %')) / 100:g}"
        method = next(one for one in methods[terms] if (one, setting) not in seen)
        seen.add((method, setting))
        for column, decimals, text in zip(("strict", "ppl_after", "kl"), (2, 3, 2), numbers, strict=True):
            cell = found[method, setting, column]
            assert text == f"{cell['mean']:.{decimals}f} ± {cell['std']:.{decimals}f}" and cell["n"] == 3
        for term, shown in zip(TERMS, filter(None, weights.split(", ")), strict=bool(weights)):
            runs = [committed_text(f"results/lambda_toy/runs/{name}.json") for name in cell["run_ids"]]
            used = mean(json.loads(run)["training"]["last_log"][f"lambda_{term}"] for run in runs)
            assert abs(float(shown) - used) <= 0.51 * 10 ** -len(shown.partition(".")[2]), (method, setting, term)
    assert seen == {(method, setting) for method, setting, _ in found}


def test_reproduction_opens_with_the_verdict_that_the_report_wrote():
    """Copied from results/toy/table.md, five lines."""
    lines = json.loads(committed_text("results/toy/table.json"))["verdict"]
    opening = PAGES["REPRODUCTION.md"].split("## ")[0]
    assert len(lines) == 5 and [line[2:] for line in opening.splitlines() if line.startswith("- ")] == lines
    assert committed_text("results/toy/table.md").splitlines()[2:7] == [f"- {line}" for line in lines]


def test_what_the_page_on_statistics_says_is_what_was_simulated():
    lines = json.loads((ROOT / "docs" / "statistics.json").read_text())["lines"]
    text = PAGES["docs/statistics.md"].partition("## What the simulation says")[2]
    found = {(line["metric"], line["num_seeds"], line["seed_sd"]): line for line in lines}

    def same(shown, share):
        decimals = len(shown.partition(".")[2])
        assert abs(float(shown) - 100 * share) <= 0.501 * 10**-decimals, (shown, share)

    header, _, *rows = [_cells(line) for line in text.splitlines() if line.startswith("|")]
    assert header == ["accuracy, seed sd 4 points", "3 seeds", "5 seeds", "10 seeds"]
    rules = {"items only": "_items_alone", "paired": "_paired", "seeds and items": ""}
    seen = set()
    for name, *shown in rows:
        kind = "false" if name.startswith("false marks") else "found"
        key = kind + next(suffix for rule, suffix in rules.items() if f", {rule}" in name)
        seen.add(key)
        for num_seeds, cell in zip((3, 5, 10), shown, strict=True):
            same(cell.removesuffix(" %"), found["accuracy", num_seeds, 4.0][key])
    assert len(seen) == len(rows) == 6

    text = " ".join(text.split())
    of = {metric: [line["false"] for line in lines if line["metric"] == metric] for metric in simulation.METRICS}
    low, high = re.search(r"wrong in ([\d.]+) to ([\d.]+) % of cases", text).groups()
    same(low, min(of["accuracy"]))
    same(high, max(of["accuracy"]))
    others = re.search(r"F1 up to ([\d.]+), Matthews ([\d.]+), perplexity ([\d.]+), Spearman ([\d.]+) %", text).groups()
    for shown, metric in zip(others, ("f1", "matthews", "perplexity", "spearman"), strict=True):
        same(shown, max(of[metric]))
    same(re.search(r"\(([\d.]+) % at sd 0 and 3 seeds\)", text)[1], found["accuracy", 3, 0.0]["false"])
    assert f"{simulation.NUM_ITEMS} items (Spearman: {simulation.NUM_RANKED})" in text
    repeats = {line["repeats"] for line in lines if line["metric"] != "accuracy"}
    (few,), many = repeats, found["accuracy", 3, 0.0]["repeats"]
    assert (
        f"{many} repetitions for accuracy, {few} for the other metrics" in text and f"({few} repetitions: ± 2)" in text
    )
    assert "At a seed sd of 4 points three seeds find a difference of 10 points in less than half of the cases" in text
    assert found["accuracy", 3, 4.0]["found"] < 0.5
    same(re.search(r"\(at 1 point in (\d+) %\)", text)[1], found["accuracy", 3, 1.0]["found"])
    assert max(line["false"] for line in lines) <= 0.06


def _newest_bench(case):
    """Of the default shape on the CPU: vocabulary → case → row, of the newest run that has the case."""
    runs = {}
    for row in csv.DictReader(committed_text("results/bench.csv").splitlines()):
        if (row["device"], row["shape"]) == ("cpu", "default"):
            runs.setdefault((row["commit"], row["vocab"]), {})[row["case"]] = row
    in_order = sorted(runs.items(), key=lambda run: next(iter(run[1].values()))["finished_at"])
    newest = {vocabulary: rows for (_, vocabulary), rows in in_order if case in rows}
    assert set(newest) == {"32000", "128000"}
    return newest


def test_the_price_of_a_step_is_that_of_the_newest_run_with_the_official_recipe():
    newest = _newest_bench("official")
    names = {"official arithmetic": "official", "fused": "fused", "fused, reference cached": "fused_cache"}
    for name, case in names.items():
        (line,) = re.findall(rf"^\| BA-LoRA, {name} \|(.*)\|$", RESULTS, flags=re.M)
        rows = [newest[vocabulary][case] for vocabulary in ("32000", "128000")]
        shown = [f"{float(row[key]):.2f}" for row in rows for key in ("step_ratio", "memory_ratio")]
        assert [cell.strip() for cell in line.split("|")] == shown, name


def test_the_ratios_to_the_best_pissa_are_those_of_the_newest_run():
    told = RESULTS.partition("**Beside the best PiSSA.**")[2].partition("**On a GPU")[0]
    for vocabulary, rows in _newest_bench("pissa_fused").items():
        assert min(rows, key=lambda case: float(rows[case]["step_s"])) == "pissa_fused"
        for name, case in (("fused with the cache", "fused_cache"), ("fused", "fused")):
            for kind in ("step", "memory"):
                what = rf"{'step' if kind == 'step' else 'peak memory'}, {name}"
                (line,) = re.findall(rf"^\| {int(vocabulary):,} \| {what} \|(.*)\|$", told, flags=re.M)
                target, measured, floor = (cell.strip() for cell in line.split("|"))
                ratio = float(rows[case][f"best_{kind}_ratio"])
                assert measured.strip("*").startswith(f"{ratio:.2f}") and floor in (
                    "",
                    f"{float(rows[case]['best_floor_ratio']):.2f}",
                )
                assert ("missed" in measured) == bool(target and round(ratio, 2) > float(target.strip("≤ ")))


def _of_the_table(result, method):
    from ba_lora.config.layers import load_config
    from ba_lora.config.schema import training_hash

    if method == "untuned":
        return result["method"] == "untuned" and result["config"]["model"]["name"] == "data/toy/clean"
    config = load_config(ROOT / "configs" / "nlg" / "toy.yaml", method=method, overrides=[f"seed={result['seed']}"])
    return result["method"] == method and result["run_id"].endswith(training_hash(config))
