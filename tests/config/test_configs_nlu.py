"""Every file in configs/nlu: it loads with every task and method, says what it costs, and its architecture trains."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ba_lora.models.t5_encoder  # noqa: F401  the Auto classes then know the T5 encoder
from ba_lora.config.layers import available_methods, load_config
from ba_lora.config.schema import to_yaml
from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.errors import UserError
from ba_lora.glue import OUT_OF_DOMAIN, TASKS
from ba_lora.models.classifier import load_classifier
from tests.conftest import ROOT
from tests.support.tiny_nlu import ARCHITECTURES, nlu_config, save_tiny_encoder

BASES = sorted((ROOT / "configs" / "nlu").glob("*.yaml"))
PAPER_BASES = [path for path in BASES if path.stem not in ("toy", "minilm")]
GLUE = [name for name in TASKS if name != "toy_pairs"]


def stem(path: Path) -> str:
    return path.stem


def tasks_of(base: Path) -> list[str]:
    return ["toy_pairs"] if base.stem == "toy" else GLUE


def test_the_files_are_found():
    assert {path.stem for path in PAPER_BASES} == {
        "deberta-v3-base", "roberta-large", "bert-large", "roberta-base", "t5-base", "gpt2-xl",
    }  # fmt: skip
    assert {path.stem for path in BASES} == set(ARCHITECTURES)


@pytest.mark.parametrize("base", BASES, ids=stem)
def test_every_base_takes_every_task_and_method(base, tmp_path):
    tasks, methods = tasks_of(base), available_methods("nlu")
    pairs = {(task, "ba_lora") for task in tasks} | {(tasks[0], method) for method in methods}  # independent layers
    for task, method in sorted(pairs):
        config = load_config(base, method=method, task=task, kind="nlu")
        assert isinstance(config, NLUConfig)
        assert (config.name, config.method, config.nlu.task) == (base.stem, method, task)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(saved)
    assert again == config and again.run_id == config.run_id


@pytest.mark.parametrize("base", PAPER_BASES, ids=stem)
def test_the_head_gives_command_cost_and_score(base):
    head = "".join(line for line in base.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    for word in ("Command", "Hardware", "Disk", "Paper", "Licence", "Sources"):
        assert re.search(rf"^# {word}: +\S", head, re.MULTILINE), f"{base.name} lacks {word}"
    command = re.search(r"^# Command: +sh scripts/nlu\.sh (\S+) task=(\w+)$", head, re.MULTILINE)
    assert command and command.group(1) == f"configs/nlu/{base.name}" and command.group(2) in TASKS
    for path in re.findall(r"(?:configs|results)/[\w./-]+\.(?:yaml|json|csv)", head):
        assert (ROOT / path).is_file(), f"{base.name} names {path}, which is not there"
    if base.stem != "deberta-v3-base":
        assert re.fullmatch(r"[0-9a-f]{40}", load_config(base, task="sst2").model.revision)


def test_the_headline_scores_are_those_of_the_csv():
    head = (ROOT / "configs/nlu/deberta-v3-base.yaml").read_text(encoding="utf-8")
    rows = list(csv.DictReader(open(ROOT / "results/paper_reported/nlu_main.csv", encoding="utf-8")))
    known = {
        row["task"]: f"{row['mean']} ± {row['std']}"
        for row in rows
        if (row["model"], row["method"]) == ("deberta-v3-base", "ba_lora") and row["task"] in TASKS
    }
    names = {"mnli": "MNLI", "sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "qnli": "QNLI", "qqp": "QQP",
             "rte": "RTE", "stsb": "STS-B"}  # fmt: skip
    text = re.sub(r"\n# +", " ", head)
    for task, name in names.items():
        assert f"{name} {known[task]}" in text


def test_the_published_settings():
    """PiSSA's table 10 for DeBERTa, the text's for MNLI; the 2024 text for RoBERTa-large."""
    wanted = {
        "mnli": (5e-5, 16, 5, 8), "sst2": (3e-5, 16, 20, 8), "mrpc": (2e-4, 32, 20, 8), "cola": (1e-4, 16, 20, 8),
        "qnli": (1e-4, 32, 10, 16), "qqp": (1e-4, 16, 10, 8), "rte": (1e-4, 16, 50, 8), "stsb": (3e-4, 8, 20, 8),
    }  # fmt: skip
    for task, (rate, batch, epochs, alpha) in wanted.items():
        config = load_config(ROOT / "configs/nlu/deberta-v3-base.yaml", task=task)
        trainer = config.trainer
        found = trainer["learning_rate"], trainer["per_device_train_batch_size"], trainer["num_train_epochs"]
        assert found == (rate, batch, epochs) and (config.adapter.rank, config.adapter.alpha) == (8, alpha)
    large = ROOT / "configs/nlu/roberta-large.yaml"
    assert load_config(large, task="mnli").trainer["learning_rate"] == 1e-4
    assert load_config(large, task="sst2").trainer["learning_rate"] == 2e-4
    weights = [load_config(large, task="sst2", method=name).regularizers for name in ("ba_lora", "ba_lora_iclr2026")]
    assert [(w.lambda_consistency, w.lambda_diversity, w.lambda_svd, w.svd_top_k) for w in weights] == [
        (1e-4, 4e-4, 1e-4, 5), (0.15, 0.03, 0.03, 5),
    ]  # fmt: skip
    assert [w.consistency_form for w in weights] == ["normalized_mse", "kl"] and weights[1].temperature == 2


def test_the_out_of_domain_names_are_those_that_can_be_evaluated():
    from eval.tasks.glue_x import out_of_domain

    assert {task: tuple(out_of_domain(task)) for task in OUT_OF_DOMAIN} == OUT_OF_DOMAIN


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"task": None}, "which task\\? add --task NAME"),
        ({"task": "sst"}, "task=sst is unknown.*sst2"),
        ({"overrides": ["regularizers.features=pool"]}, "pooled"),
        ({"overrides": ["regularizers.feature=pooled"]}, "regularizers.features"),
        ({"overrides": ["nlu.selection=best"]}, "choose one of paper, tuned"),
        ({"overrides": ["data.dev.mnli=x.jsonl"]}, "data.dev=mnli is unknown"),
        ({"overrides": ["data.class_shares.neutral=0.1"]}, "data.class_shares=neutral is unknown"),
        ({"task": "stsb", "overrides": ["data.class_shares.neutral=0.1"]}, "needs classes"),
        ({"overrides": ["regularizers.consistency_schedule=adaptive"]}, "for NLG only"),
        ({"overrides": ["data.name=glue"]}, "data.name has no effect on a run of NLU"),
        ({"overrides": ["eval.tasks=[imbd]"]}, "nearest: imdb"),
        ({"method": "bitfitt"}, "nearest: bitfit"),
    ],
)
def test_one_line_errors(words, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(ROOT / "configs/nlu/bert-large.yaml", **({"task": "sst2", "kind": "nlu"} | words))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nlu: sst2", "nlu: sst2 is no section"),
        ("method: lora\nnlu: 5", "nlu: 5 is no section"),
        ("tasks: [sst2]", "tasks: .* is no section"),
        ("tasks: {sst2: 5}", "sst2: 5 is no section"),
        ("tasks: {sst2: {nlu: 5}}", "nlu: 5 is no section"),
    ],
)
def test_a_section_that_is_none_is_told(text, message, tmp_path):
    (tmp_path / "base.yaml").write_text(f"model: {{name: x}}\n{text}\n")
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "base.yaml", task="sst2")


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("toy_pairs", ["task=sst2"], "task=sst2 and --task toy_pairs are two tasks: give one"),
        (None, ["task=toy_pairs", "nlu.task=sst2"], "task=toy_pairs and nlu.task=sst2 are two tasks: give one"),
        (None, ["task="], "which task"),
        (None, ["method="], "method= is unknown"),
    ],
)
def test_two_tasks_or_an_empty_name_are_refused(task, words, message):
    with pytest.raises(UserError, match=message):
        load_config("toy", kind="nlu", task=task, overrides=words)


def test_nlg_and_nlu_configs_are_told_apart():
    with pytest.raises(UserError, match="is an NLU config: use sh scripts/nlu.sh"):
        load_config(BASES[0], kind="nlg")
    with pytest.raises(UserError, match="is an NLG config: use sh scripts/ba-lora.sh"):
        load_config(ROOT / "configs/nlg/toy.yaml", kind="nlu", task="sst2")
    with pytest.raises(UserError, match="task=sst2 is for NLU"):
        load_config(ROOT / "configs/nlg/toy.yaml", overrides=["task=sst2"])
    with pytest.raises(UserError, match="bitfit is unknown"):
        load_config(ROOT / "configs/nlg/toy.yaml", method="bitfit")


# ---- every architecture, shrunk to two layers ----


@pytest.mark.parametrize("base", [path for path in BASES if path.stem != "minilm"], ids=stem)
def test_every_architecture_takes_a_step_and_is_exported(base, train_nlu, tmp_path, monkeypatch):
    """One step with every term in the loss; merged = plain LoRA with its head on the untouched encoder ≠ untrained."""
    folder = save_tiny_encoder(tmp_path / "model", base.stem)
    targets = load_config(base, task=tasks_of(base)[0]).adapter.target_modules
    base_text = base.read_text(encoding="utf-8")
    shrunk = tmp_path / base.name
    shrunk.write_text(base_text.replace("  wnli:", "  toy_pairs: {}\n  wnli:"), encoding="utf-8")
    run = train_nlu(
        "trainer.max_steps=1",
        "regularizers.features=pooled",
        "trainer.optim=sgd",  # AdamW would move a weight without gradient, too
        "trainer.learning_rate=1.0",
        config_path=shrunk,
        model=folder,
    )
    facts = json.loads((run / "train.json").read_text())
    assert facts["status"] == "ok" and facts["training"]["steps"] == 1 and facts["training"]["terms_off"] == {}
    log = facts["training"]["last_log"]
    assert all(isinstance(log[term], float) for term in ("task", "consistency", "diversity", "svd"))
    differences = facts["export"]["max_logit_difference"]
    assert set(differences) == {"lora", "merged"} and max(differences.values()) < 1e-4

    batch = AutoTokenizer.from_pretrained(run / "merged")(
        ["ab", "c d e"], ["f", "g"], padding=True, return_tensors="pt"
    )
    untrained = load_classifier(nlu_config(folder, "model.attention=eager"))
    with torch.no_grad():
        before = untrained.eval()(**batch).logits
        merged = AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()(**batch).logits
        served = PeftModel.from_pretrained(untrained, run / "lora").eval()(**batch).logits
    torch.testing.assert_close(served, merged, atol=1e-4, rtol=0)
    assert merged.shape == (2, 3) and (merged - before).abs().max() > 1e-5

    adapted = {name.split(".lora_A")[0] for name in untrained.state_dict() if ".lora_A" in name}
    assert adapted and not [name for name in adapted if "pooler" in name or "classifier" in name or "score" in name]
    if targets != "all-linear":
        assert {name.rsplit(".", 1)[-1] for name in adapted} == set(targets)
