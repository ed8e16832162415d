"""The commands of all pages run, and what the pages link to and name is there."""

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

import pytest

from ba_lora.config.layers import load_config
from ba_lora.config.registries import facts, parts
from ba_lora.errors import INCOMPLETE, UserError
from ba_lora.experiments.tables import available_tables
from ba_lora.io import write_jsonl_atomic
from ba_lora.runs import convert, results_nlu
from data import lab_nlu, show
from eval import chat, compare, generate, harness, score
from eval.report import __main__ as report
from scripts import bench
from tests.conftest import ROOT
from tests.runs.test_results_nlu import result as nlu_result
from tests.support.committed import committed_text
from tests.support.page_world import toy_run
from tests.support.pages import COMMANDS, PAGES, blocks, commands, example

README = PAGES["README.md"]
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
    for name in ("sst2/train", "sst2/validation", "imdb"):
        write_jsonl_atomic(tmp_path / f"{name}.jsonl", rows)
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
    tokenizer = names["tokenizer"]
    counted = [label for label in names["row"]["labels"] if label != -100]
    assert tokenizer.decode(counted) == f" 5{tokenizer.eos_token}" and tokenizer.bos_token_id not in counted
    exec(mixin, names)
    kind = names["OwnTrainer"]
    assert issubclass(kind, names["Trainer"]) and kind.compute_loss is names["BALoRALoss"].compute_loss


def test_the_script_with_trls_trainer_trains_and_exports(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    (script,) = blocks(PAGES["docs/own-data.md"], "python")
    monkeypatch.chdir(ROOT)
    names = {}
    exec(script.replace("outputs/sft", str(tmp_path)), names)
    assert names["trainer"].state.global_step == 3
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


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
