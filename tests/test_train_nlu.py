"""The whole NLU training command on tiny models, and what it leaves."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ba_lora.config import available_methods
from ba_lora.export import serving_adapter

PAIR = ("Anna bought two red boxes.", "The boxes were red.")


def logits(model, folder):
    batch = AutoTokenizer.from_pretrained(folder)(*PAIR, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("method", available_methods("nlu"))
def test_every_method_trains_and_exports(train_nlu, tiny_encoder, method):
    """merged = adapter with its head on the untouched encoder, by plain PEFT."""
    steps = ["trainer.num_train_epochs=4"] if method == "adalora" else []
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
