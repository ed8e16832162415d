"""The whole NLU training command on tiny models, and what it leaves."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ba_lora.config.layers import available_methods, load_config
from ba_lora.errors import UserError
from ba_lora.glue import find_task
from ba_lora.io import write_jsonl_atomic
from ba_lora.runs.export import serving_adapter
from data.toy_nlu import generate_pairs
from eval import nlu
from eval.classify import open_classifier
from tests.support.tiers import mostly_slow
from tests.support.tiny import only_result
from tests.support.tiny_nlu import publish, tiny_overrides, write_sst2

PAIR = ("Anna bought two red boxes.", "The boxes were red.")


def logits(model, folder):
    batch = AutoTokenizer.from_pretrained(folder)(*PAIR, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


MERGED = [method for method in available_methods("nlu") if load_config("toy", kind="nlu", method=method).export.merged]
APART = sorted({*available_methods("nlu")} - {*MERGED})


@pytest.mark.parametrize("method", mostly_slow(MERGED, ("full_ft", "bitfit", "lora", "ba_lora")))
def test_every_method_trains_and_exports(train_nlu, tiny_encoder, method):
    """merged = adapter with its head on the untouched encoder, by plain PEFT."""
    steps = {"adalora": ["trainer.num_train_epochs=4"], "delta_lora": ["adapter.options.start=1"]}.get(method, [])
    run = train_nlu(*steps, method=method)
    merged = logits(AutoModelForSequenceClassification.from_pretrained(run / "merged"), run / "merged")
    facts = json.loads((run / "train.json").read_text())
    assert facts["status"] == "ok"
    differences = facts["export"]["max_logit_difference"]
    assert differences and max(differences.values()) < 1e-4
    if (run / "adapter").is_dir():
        base = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
        served = logits(PeftModel.from_pretrained(base, serving_adapter(run)), run / "merged")
        torch.testing.assert_close(served, merged, atol=1e-4, rtol=0)
    assert load_file(run / "merged" / "model.safetensors")["classifier.weight"].abs().max() > 0
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt") and "checkpoints" not in path.parts]


@pytest.mark.parametrize("method", mostly_slow(APART, ("nmtune", "houlsby")))
def test_what_cannot_be_merged_is_evaluated_from_its_adapter(train_nlu, tiny_encoder, method):
    """The classifier that the evaluation opens predicts what the trained one did."""
    run = train_nlu(method=method)
    assert not (run / "merged").exists() and not (run / "lora").exists()
    facts = json.loads((run / "train.json").read_text())
    assert 0 <= facts["export"]["max_logit_difference"]["adapter"] < 1e-4
    classifier = open_classifier(run / "adapter", find_task("toy_pairs"))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=3)
    assert (logits(classifier.model, run / "adapter") - logits(base, run / "adapter")).abs().max() > 1e-3
    other = run.parent / "other.jsonl"
    pairs = generate_pairs(num_rows=6, seed=3, split="test")
    write_jsonl_atomic(other, [{key: row[key] for key in ("premise", "hypothesis", "label")} for row in pairs])
    nlu.main(["--model", str(run), "--task", "toy_pairs", "--data", f"toy_pairs={other}"])  # to be predicted
    assert json.loads((run / "scores" / "toy_pairs.json").read_text())["n"] == 6
    terms = {name for line in (run / "log.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert ("nmtune_covariance" in terms) == (method == "nmtune")


def test_the_record_names_the_commit_of_an_unpinned_base(train_nlu, tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    publish(tiny_encoder, tmp_path / "hub", name="someone/encoder", commit="c" * 40)
    run = train_nlu("model.name=someone/encoder", "trainer.max_steps=1", "export.merged=false", method="lora")
    facts = json.loads((run / "train.json").read_text())
    assert facts["status"] == "ok" and facts["model"] == {"name": "someone/encoder", "revision": "c" * 40}


def pipeline(words, root, *, kill_after_s=None):
    """Run `python -m ba_lora.experiments.pipeline_nlu`; after so many seconds kill it with all it has started. Return
    its table."""
    command = [sys.executable, "-m", "ba_lora.experiments.pipeline_nlu", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    assert process.returncode == 0, errors[-3000:]
    return output


def test_zero3_is_refused_whoever_asks_for_it(train_nlu, request):
    """`accelerate launch` sets it without a word in the config; so does a file of settings of any name."""
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    request.addfinalizer(unset_hf_deepspeed_config)
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 2}})  # while it is, transformers goes by it
    train_nlu("trainer.max_steps=1", "export.merged=false", name="zero2")
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match="NLU runs do not support ZeRO-3: use DDP or") as error:
        train_nlu(name="zero3")
    assert alive.is_zero3() and "\n" not in str(error.value)


@pytest.mark.slow
def test_the_whole_command_killed_at_4_instants(root, tmp_path, tiny_encoder):
    """Training, export, an evaluation out of its domain, the result: in the end those of the uninterrupted command."""
    train, dev = write_sst2(tmp_path / "data")
    words = [str(root / "configs/nlu/minilm.yaml"), "method=ba_lora", "task=sst2", *tiny_overrides(tiny_encoder)]
    words += [f"data.source={train}", f"data.dev.sst2={dev}", "eval.tasks=[imdb]", f"eval.data.imdb={dev}"]
    words += ["trainer.save_strategy=epoch", f"results_dir={tmp_path / 'results'}"]

    def facts(name):
        result = only_result(tmp_path / "results")
        scores = {
            task: (score["metrics"], score["interval_95"], score.get("drop"))
            for task, score in result["evaluation"].items()
        }
        assert set(scores) == {"sst2", "imdb"}
        files = sorted(path for path in (tmp_path / name / "merged").iterdir() if path.name != "README.md")
        return result["status"], scores, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    started = time.perf_counter()
    assert pipeline([*words, f"output_dir={tmp_path / 'whole'}"], root)
    duration_s = time.perf_counter() - started
    whole = facts("whole")
    generator, num_killed = random.Random(0), 0
    for number in range(4):
        own = [*words, f"output_dir={tmp_path / f'killed{number}'}"]
        shutil.rmtree(tmp_path / "results")
        num_killed += pipeline(own, root, kill_after_s=generator.uniform(0, duration_s)) is None
        assert pipeline(own, root)
        assert facts(f"killed{number}") == whole, number
    assert num_killed >= 3
