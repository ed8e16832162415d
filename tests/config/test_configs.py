"""Every file in configs/: it loads, its head says what it costs, its arithmetic holds, and its architecture trains."""

import csv
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from ba_lora.config.layers import METHODS_PATH, available_methods, load_config
from ba_lora.config.schema import to_yaml
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.errors import UserError
from tests.conftest import ROOT
from tests.support.tiers import mostly_slow

BASES = sorted((ROOT / "configs" / "nlg").glob("*.yaml"))
PAPER_BASES = [path for path in BASES if path.stem != "toy"]
ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN_4_BIT = {"llama-3-70b", "yi-1.5-34b", "deepseek-moe-16b", "mixtral-8x7b"}
ATTENTION_ONLY = {"deepseek-moe-16b", "mixtral-8x7b"}
CAN_QUANTIZE = {  # weights in 4 bit train only under LoRA-like adapters
    *("lora", "rslora", "dora", "pissa", "lora_plus", "lora_fa", "lora_pro", "dylora", "delta_lora", "loftq"),
    *(name for name in available_methods() if name.startswith(("ba_lora", "lora_ba", "lora_c", "lora_d", "lora_s"))),
}


def stem(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", sorted(METHODS_PATH.glob("*.yaml")), ids=stem)
def test_the_head_of_a_method_tells_its_source_and_settings(path: Path) -> None:
    """Which settings are the paper's, or that they are not known; full fine-tuning and ours have none of others."""
    head = path.read_text(encoding="utf-8").split("\nadapter:")[0]
    if path.stem not in ("full_ft", "ba_lora", "ba_lora_iclr2026"):
        assert re.search(r"\barXiv \d{4}\.\d{5}\b", head) and "Theirs" in head


def test_the_files_are_found() -> None:
    """A glob over the wrong folder would make every test below pass."""
    assert {path.stem for path in PAPER_BASES} == {
        "llama-2-7b", "llama-2-13b", "llama-3-8b", "llama-3-70b", "mistral-7b",
        "gemma-7b", "qwen1.5-7b", "yi-1.5-34b", "deepseek-moe-16b", "mixtral-8x7b",
    }  # fmt: skip
    assert len(BASES) == len(PAPER_BASES) + 1
    assert {path.stem for path in ACCELERATE} == {"single_gpu", "multi_gpu", "multi_node", "cpu", "zero2", "zero3"}
    assert {path.stem for path in DEEPSPEED} == {"zero2", "zero3"}
    assert len(available_methods()) > 0


# ---- base × method ----


@pytest.mark.parametrize(
    "pair",
    mostly_slow(
        [(base, method) for base in BASES for method in available_methods()],
        {
            f"{base.stem}-{method}"
            for base in BASES
            for method in available_methods()
            if base.stem in ("toy", "mixtral-8x7b") or method in ("full_ft", "lora", "dora", "pissa", "ba_lora")
        },
        name=lambda pair: f"{pair[0].stem}-{pair[1]}",
    ),
)
def test_every_base_takes_every_method(pair: tuple[Path, str]) -> None:
    base, method = pair
    if base.stem in IN_4_BIT and method not in CAN_QUANTIZE:
        with pytest.raises(UserError, match="nf4"):
            load_config(base, method=method)
        config = load_config(base, method=method, overrides=["model.quantization=none"])
    else:
        config = load_config(base, method=method)
    assert isinstance(config, NLGConfig)
    assert (config.name, config.method) == (base.stem, method)


@pytest.mark.parametrize("version", ["", "_iclr2026"])
@pytest.mark.parametrize(("kind", "task"), [("nlg", None), ("nlu", "toy_pairs")])
def test_the_factorials_methods_are_the_whole_ones_cut_down(version: str, kind: str, task: str | None) -> None:
    """A term alone is that of the whole method, the other two off; on LoRA only the adapter is another."""

    def resolved(method: str) -> tuple[dict, dict]:
        config = load_config(ROOT / "configs" / kind / "toy.yaml", method=method, task=task, kind=kind)
        return asdict(config.adapter), asdict(config.regularizers)

    pissa, whole = resolved(f"ba_lora{version}")
    lora, _ = resolved("lora")
    assert pissa["init"] == "pissa" and lora["init"] == "lora"
    assert resolved(f"lora_ba{version}") == (lora, whole)
    terms = {
        "consistency": ("temperature", "consistency_schedule", "consistency_form"),
        "diversity": ("diversity_top_k", "diversity_schedule", "diversity_form"),
        "svd": ("svd_top_k", "svd_norm", "svd_schedule"),
    }
    for term, settings in terms.items():
        for name, adapter in (("ba_lora", pissa), ("lora", lora)):
            found, alone = resolved(f"{name}_{term}{version}")
            assert found == adapter
            weights = {other: alone[f"lambda_{other}"] for other in terms}
            assert weights == dict.fromkeys(terms, 0) | {term: whole[f"lambda_{term}"]}
            assert [alone.get(key) for key in settings] == [whole.get(key) for key in settings], (name, term)


@pytest.mark.parametrize("base", BASES, ids=stem)
def test_the_resolved_config_reproduces_itself(base: Path, tmp_path: Path) -> None:
    for method in ("ba_lora", "ba_lora_iclr2026", "lora"):
        config = load_config(base, method=method, overrides=["seed=7"])
        saved = tmp_path / f"{method}.yaml"
        saved.write_text(to_yaml(config), encoding="utf-8")
        again = load_config(saved)
        assert again == config
        assert again.run_id == config.run_id
        assert to_yaml(again) == to_yaml(config)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("model.revison=main", "model.revision"),
        ("adaptor.rank=8", "adapter"),
        ("trainer.learningrate=1", "learning_rate"),
        ("trainer.warmup_ratio=0.03", "warmup_steps"),
        ("learning_rate=1", "(nearest: trainer.learning_rate)"),
        ("max_steps=1", "(nearest: trainer.max_steps)"),
        ("epochs=1", "(nearest: trainer.num_train_epochs)"),
        ("batch_size=1", "(nearest: trainer.per_device_train_batch_size)"),
        ("lr=1", "(nearest: trainer.learning_rate)"),
        ("trainer.lr=1", "(nearest: trainer.learning_rate)"),
        ("rank=8", "(nearest: adapter.rank)"),
        ("dtype=float32", "(nearest: model.dtype, adapter.dtype, reference.dtype)"),
        ("regularizers.lambda_consistancy=0", "regularizers.lambda_consistency"),
        ("data.name=metamath", "metamathqa"),
        ("eval.task=gsm8k", "eval.tasks"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_nearest(override: str, nearest: str) -> None:
    with pytest.raises(UserError, match=re.escape(nearest)) as error:
        load_config(BASES[0], overrides=[override])
    assert "\n" not in str(error.value)


def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("model: {name: m}\ntrainner: {max_steps: 1}\n")
    with pytest.raises(UserError, match="trainner.*trainer"):
        load_config(path)


# ---- what the bases say ----


@pytest.mark.parametrize("base", PAPER_BASES, ids=stem)
def test_the_head_gives_command_cost_and_score(base: Path) -> None:
    head = "".join(line for line in base.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    for word in ("Command", "Hardware", "Disk", "Paper", "Licence"):
        assert re.search(rf"^# {word}: +\S", head, re.MULTILINE), f"{base.name} lacks {word}"
    command = re.search(r"^# Command: +sh scripts/ba-lora\.sh (\S+)$", head, re.MULTILINE)
    assert command and command.group(1) == f"configs/nlg/{base.name}"
    assert re.search(r"[\d.]+ GB", head)
    for path in re.findall(r"(?:configs|results)/[\w./-]+\.(?:yaml|json|csv)", head):
        assert (ROOT / path).is_file(), f"{base.name} names {path}, which is not there"


@pytest.mark.parametrize("base", PAPER_BASES, ids=stem)
def test_the_recipe_is_the_papers(base: Path) -> None:
    config = load_config(base)
    trainer = config.trainer
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] == 128
    assert (trainer["learning_rate"], trainer["lr_scheduler_type"], trainer["warmup_steps"]) == (2e-5, "cosine", 0.03)
    assert (trainer["num_train_epochs"], trainer["weight_decay"], trainer["optim"]) == (1, 0, "adamw_torch")
    assert (config.data.name, config.data.num_rows, config.data.max_length) == ("metamathqa", 100_000, 512)
    assert config.data.sample_seed is None
    assert config.eval.tasks == ["gsm8k", "math"]
    assert config.adapter.rank == (64 if base.stem in ("mistral-7b", "gemma-7b") else 128)
    assert config.adapter.alpha is None and config.adapter.dropout == 0
    assert config.adapter.target_modules == (SEVEN[:4] if base.stem in ATTENTION_ONLY else SEVEN)
    assert config.model.quantization == ("nf4" if base.stem in IN_4_BIT else "none")
    assert config.model.trust_remote_code is False
    assert re.fullmatch(r"[0-9a-f]{40}", config.model.revision)


def test_eight_gpus_keep_the_effective_batch() -> None:
    config = load_config(ROOT / "configs/nlg/llama-2-7b.yaml", overrides=["trainer.gradient_accumulation_steps=16"])
    assert config.trainer["per_device_train_batch_size"] * config.trainer["gradient_accumulation_steps"] * 8 == 128


def test_the_variants_in_the_head_load() -> None:
    base = ROOT / "configs/nlg/llama-2-7b.yaml"
    code = load_config(base, overrides=["data.name=codefeedback", "eval.tasks=[humaneval,mbpp]"])
    assert (code.data.name, code.data.revision, code.eval.tasks) == ("codefeedback", None, ["humaneval", "mbpp"])
    late = load_config(
        base,
        overrides=[
            "method=ba_lora_iclr2026",
            "seed=1024",
            "trainer.per_device_train_batch_size=4",
            "trainer.gradient_accumulation_steps=8",
        ],
    )
    assert late.trainer["per_device_train_batch_size"] * late.trainer["gradient_accumulation_steps"] == 32
    assert (late.regularizers.lambda_consistency, late.regularizers.svd_norm) == (0.025, "frobenius")
    load_config(base, overrides=["model.dtype=float32", "trainer.bf16=false"])
    load_config(base, method="full_ft", overrides=["trainer.deepspeed=configs/deepspeed/zero3.json"])


def test_the_head_of_a_method_has_its_source_and_tells_what_is_theirs_and_ours() -> None:
    """Full fine-tuning has no paper, and BA-LoRA is what the others are compared with."""
    files = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
    heads = {file.stem: file.read_text(encoding="utf-8").split("\n\n")[0] for file in files}
    for name in heads.keys() - {"full_ft", "ba_lora", "ba_lora_iclr2026"}:
        head = " ".join(line.removeprefix("# ") for line in heads[name].splitlines() if line.startswith("#"))
        assert re.search(r"arXiv \d{4}\.\d{5}", head) and "Theirs" in head and "Ours" in head, name


@pytest.mark.parametrize("table", sorted((ROOT / "results" / "paper_reported").glob("*.csv")), ids=stem)
def test_reported_numbers_are_tidy(table: Path) -> None:
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = ["table", "model", "method", "setting", "task", "metric", "mean", "std", "source"]
    assert rows and list(rows[0]) == columns
    cells = [tuple(row[column] for column in columns[:6]) for row in rows]
    assert len(cells) == len(set(cells)), "one number a cell"
    for row in rows:
        assert row["table"] == table.stem and row["source"]
        float(row["mean"])
        if row["std"]:
            float(row["std"])


# ---- launchers ----


@pytest.mark.parametrize("file", ACCELERATE, ids=stem)
def test_accelerate_reads_its_configs(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes >= 1
    assert config.use_cpu == (file.stem == "cpu")
    if file.stem.startswith("zero"):
        assert config.distributed_type.value == "DEEPSPEED"
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()
        assert config.mixed_precision is None, "accelerate refuses it beside a DeepSpeed file"


@pytest.mark.parametrize("file", DEEPSPEED, ids=stem)
def test_deepspeed_configs_leave_the_recipe_to_the_run(file: Path) -> None:
    pytest.importorskip("deepspeed")
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(str(file))
    assert config.get_value("zero_optimization.stage") == int(file.stem.removeprefix("zero"))
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16.enabled"):
        assert config.get_value(key) == "auto"
    assert config.get_value("optimizer") is None, "the optimizer is TrainingArguments'"
    if file.stem == "zero3":
        assert config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") is True


# ---- every architecture, shrunk to two layers ----

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Base → transformers' model type and what is particular about it beside the sizes.
ARCHITECTURES = {
    "llama-2-7b": ("llama", {"num_key_value_heads": 4}),
    "llama-2-13b": ("llama", {"num_key_value_heads": 4}),
    "llama-3-8b": ("llama", {"rope_theta": 500000.0}),
    "llama-3-70b": ("llama", {"rope_theta": 500000.0}),
    "yi-1.5-34b": ("llama", {"rope_theta": 5000000.0}),
    "mistral-7b": ("mistral", {"sliding_window": 64}),
    "gemma-7b": ("gemma", {"head_dim": 16, "num_key_value_heads": 4}),
    "qwen1.5-7b": ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "mixtral-8x7b": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}
REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class DeepseekConfig(LlamaConfig):
    model_type = "deepseek"


class DeepseekForCausalLM(LlamaForCausalLM):
    config_class = DeepseekConfig
"""


def shrink(base: str, folder: Path) -> Path:
    """Write a random two-layer model of the base's architecture, with a byte-level tokenizer; return the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.tiny import save_tiny_model

    model_type, particular = ARCHITECTURES[base]
    torch.manual_seed(0)
    return save_tiny_model(
        folder, model=AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SMALL | particular)))
    )


def shrink_deepseek(folder: Path) -> Path:
    """Write a small model whose type only its own Python file knows, as the hub's DeepSeek-MoE-16B."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.tiny import save_tiny_model

    torch.manual_seed(0)
    save_tiny_model(folder, model=LlamaForCausalLM(LlamaConfig(**SMALL)))
    (folder / "modeling_deepseek.py").write_text(REMOTE_CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "deepseek",
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_deepseek.DeepseekConfig",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def small_run(folder: Path) -> list[str]:
    """Return the overrides that turn a base into one step of two micro-batches on the CPU."""
    return [
        f"model.name={folder}",
        "model.revision=null",
        "model.dtype=float32",
        "model.quantization=none",
        "adapter.rank=4",
        "data.name=toy",
        "data.num_rows=8",
        "data.max_length=400",
        "trainer.max_steps=1",
        "trainer.per_device_train_batch_size=2",
        "trainer.gradient_accumulation_steps=2",
        "trainer.learning_rate=0.01",
        "trainer.warmup_steps=0",
        "trainer.logging_steps=1",
        "trainer.bf16=false",
        "trainer.use_cpu=true",
        "trainer.disable_tqdm=true",
    ]


def check_run(run: Path, folder: Path, base: Path, *, trust_remote_code: bool = False) -> None:
    """One step was taken with all terms in the loss; merged = plain LoRA on the untouched base ≠ that base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = json.loads((run / "train.json").read_text())
    assert facts["status"] == "ok" and facts["training"]["steps"] == 1
    assert {"task", "consistency", "diversity", "svd"} <= set(facts["training"]["last_log"])
    differences = facts["export"]["max_logit_difference"]
    assert set(differences) == {"lora", "merged"} and max(differences.values()) < 1e-3
    saved = json.loads((run / "lora" / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == sorted(load_config(base).adapter.target_modules)

    def load(path: Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code)

    ids = AutoTokenizer.from_pretrained(run / "merged")("Tom has 3 apples.", return_tensors="pt").input_ids
    with torch.no_grad():
        before = load(folder).eval()(ids).logits
        merged = load(run / "merged").eval()(ids).logits
        served = PeftModel.from_pretrained(load(folder), run / "lora").eval()(ids).logits
    torch.testing.assert_close(served, merged, atol=1e-4, rtol=0)
    assert (merged - before).abs().max() > 1e-5


def test_every_base_has_its_architecture_here() -> None:
    assert set(ARCHITECTURES) | {"deepseek-moe-16b"} == {path.stem for path in PAPER_BASES}


@pytest.mark.parametrize("base", [path for path in PAPER_BASES if path.stem in ARCHITECTURES], ids=stem)
def test_every_architecture_takes_a_step_and_is_exported(base: Path, train, tmp_path: Path) -> None:
    folder = shrink(base.stem, tmp_path / "model")
    run = train(*small_run(folder), config_path=base)
    check_run(run, folder, base)


def test_mixtral_refuses_the_experts_in_one_line(train, tmp_path: Path) -> None:
    """Its experts are 3-D parameters in transformers 5: gate_proj and its like are no linear layers."""
    folder = shrink("mixtral-8x7b", tmp_path / "model")
    with pytest.raises(UserError, match="gate_proj.*matches no linear layer") as error:
        train(
            *small_run(folder),
            f"adapter.target_modules=[{','.join(SEVEN)}]",
            config_path=ROOT / "configs/nlg/mixtral-8x7b.yaml",
        )
    assert "\n" not in str(error.value)


def test_deepseek_moe_needs_trust_typed_by_hand(train, tmp_path: Path) -> None:
    folder = shrink_deepseek(tmp_path / "model")
    base = ROOT / "configs/nlg/deepseek-moe-16b.yaml"
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true") as error:
        train(*small_run(folder), config_path=base)
    assert "\n" not in str(error.value)
    run = train(*small_run(folder), "model.trust_remote_code=true", config_path=base, name="trusted")
    check_run(run, folder, base, trust_remote_code=True)
