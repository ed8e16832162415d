"""Tiny random classifiers of every architecture of configs/nlu, and rows for them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, T5EncoderModel

from ba_lora.config.layers import load_config
from ba_lora.config.methods import tuner_facts
from ba_lora.config.schema_nlu import NLUConfig
from ba_lora.io import write_jsonl_atomic

_SMALL = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 300,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
# Base → transformers' model type and its sizes.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "toy": ("bert", _SMALL),
    "minilm": ("bert", _SMALL),
    "bert-large": ("bert", _SMALL),
    "roberta-base": ("roberta", _SMALL),
    "roberta-large": ("roberta", _SMALL),
    "deberta-v3-base": (
        "deberta-v2",
        _SMALL
        | {
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_buckets": 16,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "pooler_hidden_size": 32,
        },
    ),
    "t5-base": (
        "t5",
        {"vocab_size": 262, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0},
    ),
    "gpt2-xl": (
        "gpt2",
        {
            "vocab_size": 262,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 300,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
    ),
}


def save_tiny_encoder(folder: Path, base: str = "toy", *, dropout: float | None = None) -> Path:
    """Write a random two-layer model of the base's architecture, without a head, and a byte-level tokenizer."""
    kind, sizes = ARCHITECTURES[base]
    sizes = dict(sizes)
    if dropout is not None:
        sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    model = T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)
    if kind == "t5":
        model.config.is_encoder_decoder = True  # as the published checkpoints say
    model.save_pretrained(folder)
    _tokenizer(kind).save_pretrained(folder)
    return folder


def publish(folder: Path, hub: Path, *, name: str, commit: str) -> None:
    """Lay the model in `folder` into the hub's cache `hub` as if `name` had been loaded there at its newest commit."""
    repository = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Bytes; [CLS] text [SEP] text [SEP] for encoders, text [SEP] for T5, the bare text, unpadded, for GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = ["<pad>", "[CLS]", "[SEP]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", bos_token="[SEP]")
    first = "" if kind == "t5" else "[CLS] "
    second = "$B:1 [SEP]:1" if kind == "bert" else "$B [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A [SEP]", pair=f"{first}$A [SEP] {second}", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", cls_token="[CLS]", sep_token="[SEP]", model_input_names=names
    )


def tiny_overrides(folder: Path, *, method: str = "ba_lora") -> list[str]:
    """Return the overrides that turn a base into a few CPU steps on the self-made pairs with the model in `folder`."""
    has_rank = "rank" not in tuner_facts(load_config("toy", method=method, kind="nlu").adapter)["ignores"]
    return [
        *(["adapter.rank=4"] if has_rank else []),
        f"model.name={folder}", "model.revision=null", "model.dtype=float32", "data.num_rows=24",
        "data.max_length=200", "data.toy.dev_rows=12", "trainer.per_device_train_batch_size=8",
        "trainer.per_device_eval_batch_size=12", "trainer.gradient_accumulation_steps=1", "trainer.learning_rate=0.01",
        "trainer.warmup_steps=0", "trainer.logging_steps=1", "trainer.bf16=false", "trainer.use_cpu=true",
        "trainer.disable_tqdm=true", "trainer.num_train_epochs=2",
    ]  # fmt: skip


def write_sst2(folder: Path, *, num_rows: int = 24, labels: tuple[int, ...] = (0, 1)) -> tuple[Path, Path]:
    """Write a made-up SST-2 of two files; return (train, dev)."""
    words = {0: ("bad", "dull", "poor"), 1: ("good", "fine", "great")}
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "dev.jsonl"
    for offset, file in enumerate(files):
        rows = []
        for index in range(num_rows):
            label = labels[index % len(labels)]
            rows.append({"sentence": f"a {words[label][(index + offset) % 3]} film {index}", "label": label})
        write_jsonl_atomic(file, rows)
    return files


def nlu_config(folder: Path, *overrides: str, method: str = "ba_lora", base: Path | None = None) -> NLUConfig:
    """Return a resolved config on the tiny model in `folder`."""
    from tests.conftest import ROOT

    path = base or ROOT / "configs" / "nlu" / "toy.yaml"
    return load_config(path, method=method, overrides=[*tiny_overrides(folder, method=method), *overrides], kind="nlu")


def tiny_classifier(folder: Path, *overrides: str, method: str = "pissa") -> torch.nn.Module:
    """Return the model in `folder` with its new head and the method's adapter, ready to train."""
    import tempfile

    from ba_lora.methods.build import build_model

    config = nlu_config(folder, *overrides, method=method)
    return build_model(config, run_path=Path(tempfile.mkdtemp()), num_steps=10)[0]


def tiny_pairs(folder: Path, num_rows: int) -> Dataset:
    """Return tokenized self-made pairs."""
    from transformers import AutoTokenizer

    from data.nlu import load_nlu_data

    config = nlu_config(folder, f"data.num_rows={num_rows}")
    return load_nlu_data(config, AutoTokenizer.from_pretrained(folder)).train


def scored_run(folder: Path, *overrides: str, task: str = "rte", made_from: str | None = None) -> NLUConfig:
    """Leave in `folder` what a training on the hub's rows leaves there, its model aside; return the run's config.

    Each dev set has two rows, of which one is predicted right. made_from: the hub's set with its commit; None: pinned.
    """
    from ba_lora.config.schema import to_yaml
    from ba_lora.glue import find_task, hub_source
    from ba_lora.io import write_json_atomic, write_text_atomic
    from eval.nlu_scores import dev_scores
    from tests.conftest import ROOT

    words = [f"task={task}", f"output_dir={folder}", "export.merged=false", *overrides]
    config = load_config(ROOT / "configs/nlu/minilm.yaml", method="lora", overrides=words, kind="nlu")
    made_from = made_from or hub_source(config.data.revision)
    revision = made_from.split("@")[1]
    dev = {"source": made_from, "revision": revision, "sha256": None}
    dev["data_sha256"] = {"hub": made_from, "fingerprint": "f", "revision": revision}
    names, labels = find_task(task).dev_sets, find_task(task).labels
    data = {"revision": revision, "classes": dict.fromkeys(labels, 10), "dev": dict.fromkeys(names, dev)}
    lines = [
        {"task_id": f"{name}/{row}", "label": row, "prediction": 0, "logits": [1.0] + [0.0] * (len(labels) - 1)}
        for name in names
        for row in (0, 1)
    ]
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").touch()
    write_text_atomic(folder / "config.yaml", to_yaml(config))
    write_json_atomic(folder / "train.json", {"status": "ok", "data": data})
    write_jsonl_atomic(folder / "predictions" / "best.jsonl", lines)
    for name, score in dev_scores(folder, config, data).items():
        write_json_atomic(folder / "scores" / f"{name}.json", score)
    return config


def classifier_trainer(model, args, *, regularizers, cache=None, **settings):
    """A BALoRATrainer with a ClassifierObjective."""
    from ba_lora.objective.objective_nlu import ClassifierObjective
    from ba_lora.training.trainer import BALoRATrainer

    objective = ClassifierObjective(model, regularizers, micro_batch=args.per_device_train_batch_size, cache=cache)
    return BALoRATrainer(model, args, objective=objective, **settings)
