"""Every kind of model that AutoModelForSequenceClassification loads: one step of each version, export, reload."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ba_lora.errors import UserError
from ba_lora.models.classifier import load_classifier
from tests.support import tiny_nlu

_ENCODER = tiny_nlu._SMALL
_DECODER = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 300,
    "pad_token_id": None,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
# model type → sizes; decoders take GPT-2's tokenizer, which has no padding token and no form for pairs
KINDS: dict[str, dict] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "camembert": _ENCODER,
    "electra": _ENCODER | {"embedding_size": 32},
    "albert": _ENCODER | {"embedding_size": 32},
    "distilbert": {
        "vocab_size": 262, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 300,
        "pad_token_id": 0,
    },
    "modernbert": {
        key: value for key, value in _ENCODER.items() if key != "type_vocab_size"
    } | {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "global_attn_every_n_layers": 1},
    "deberta-v2": tiny_nlu.ARCHITECTURES["deberta-v3-base"][1],
    "gpt2": tiny_nlu.ARCHITECTURES["gpt2-xl"][1],
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER | {"head_dim": 8},
    "mistral": _DECODER,
    "gemma2": _DECODER | {"head_dim": 8},
    "phi3": _DECODER | {"num_key_value_heads": 4},
}  # fmt: skip
ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "albert",
    "distilbert",
    "modernbert",
    "deberta-v2",
)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ba_lora_iclr2026", "ba_lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_export_and_reload(kind, method, train_nlu, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_nlu.ARCHITECTURES, kind, (kind, KINDS[kind]))
    model = tiny_nlu.save_tiny_encoder(tmp_path / "model", kind)
    if kind not in ENCODERS:
        tiny_nlu._tokenizer("gpt2").save_pretrained(model)
    words = ["trainer.max_steps=1", "adapter.target_modules=all-linear"]
    if kind == "deberta-v2":  # which has only that form
        with pytest.raises(UserError, match="choose model.attention=eager"):
            train_nlu(*words, method=method, model=model)
        words.append("model.attention=eager")
    run = train_nlu(*words, method=method, model=model)
    trained = json.loads((run / "train.json").read_text())
    assert (
        trained["training"]["terms_off"].keys() <= {"svd"}
        and trained["export"]["max_logit_difference"]["merged"] < 1e-3
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(run / "merged")
    rows = [json.loads(line) for line in (run / "predictions" / "best.jsonl").read_text().splitlines()]
    assert loaded.config.num_labels == 3 and len(rows[0]["logits"]) == 3
    ids = AutoTokenizer.from_pretrained(run / "merged")(["a text"], return_tensors="pt")
    with torch.no_grad():
        assert loaded(**ids).logits.isfinite().all()


def test_a_padding_token_of_its_own_is_not_read_as_text(tmp_path, monkeypatch):
    """Qwen2.5's: no pad_token_id in the model's config, and rows are padded with another token than EOS."""
    monkeypatch.setitem(tiny_nlu.ARCHITECTURES, "llama", ("llama", KINDS["llama"]))
    folder = tiny_nlu.save_tiny_encoder(tmp_path / "model", "llama")
    tokenizer = tiny_nlu._tokenizer("gpt2")
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder)
    model = load_classifier(tiny_nlu.nlu_config(folder)).eval()
    rows = [tokenizer(text)["input_ids"] for text in ("a", "a longer text")]
    alone = [model(torch.tensor([ids])).logits[0] for ids in rows]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    torch.testing.assert_close(model(**batch).logits, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_a_head_of_another_form_is_refused(train_nlu, tmp_path, monkeypatch):
    """BA-LoRA must run the head by itself; XLNet's lies behind a summary that picks its own position."""
    sizes = {"vocab_size": 262, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0}
    monkeypatch.setitem(tiny_nlu.ARCHITECTURES, "xlnet", ("xlnet", sizes))
    model = tiny_nlu.save_tiny_encoder(tmp_path / "model", "xlnet")
    with pytest.raises(UserError, match="is of an unknown form"):
        train_nlu("trainer.max_steps=1", "model.attention=eager", method="ba_lora", model=model)
