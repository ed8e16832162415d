"""Tiny random models and rows for tests that need a trainer but no real language."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from ba_lora.io import read_json
from ba_lora.objective.reference_cache.fill import claim, fill
from ba_lora.objective.reference_cache.store import CachedReference, Rows, open_cache

VOCABULARY = 64


def only_result(folder: Path) -> dict[str, Any]:
    """Return the one result in a folder of results."""
    (path,) = folder.glob("*.json")
    return read_json(path)


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> LlamaForCausalLM:
    """Return a random Llama of 2 layers; the same for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_peft(init: bool | str, *, rank: int = 4, dropout: float = 0.0, **settings: Any) -> PeftModel:
    """Return the tiny Llama with a LoRA (True) or PiSSA ("pissa") adapter on all linear layers."""
    model = tiny_llama(**settings)
    torch.manual_seed(1)
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            lora_dropout=dropout,
            target_modules="all-linear",
            init_lora_weights=init,
            task_type="CAUSAL_LM",
        ),
    )


def tiny_rows(num_rows: int, *, seed: int = 0) -> Dataset:
    """Return numbered rows of unequal lengths with unequal shares of response tokens, as data/nlg.py makes them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(num_rows):
        length = int(torch.randint(8, 24, (1,), generator=generator))
        prompt = int(torch.randint(2, length - 3, (1,), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * length, "row": number})
    return Dataset.from_list(rows)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad on the right: ids with 0, labels with −100, the mask with 0; keep the rows' numbers, where there are any."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    batch = {
        key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
        for key, value in fill.items()
    }
    return batch | ({"row": torch.tensor([row["row"] for row in rows])} if "row" in rows[0] else {})


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Return quiet CPU arguments that keep the rows in their order."""
    chosen = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "ddp_find_unused_parameters": False,
        "seed": 3,
    } | settings
    return TrainingArguments(output_dir=str(folder), **chosen)


def tiny_cache(
    path: Path, rows: Dataset, *, top_k: int = VOCABULARY, dtype: str = "float32", temperature: float = 1.0
) -> CachedReference:
    """Return the reference cache of the tiny Llama on these rows, whole where no other process computes it too."""
    key = {
        "vocabulary": VOCABULARY,
        "model.dtype": "float32",
        "reference.top_k": top_k,
        "reference.dtype": dtype,
        "regularizers.temperature": temperature,
    }
    if PartialState().is_main_process:
        claim(open_cache(path, key, Rows.of(rows)))
    PartialState().wait_for_everyone()
    cache = open_cache(path, key, Rows.of(rows))
    fill(cache, tiny_llama)
    return cache


def adapter_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the trainable weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def save_tiny_model(folder: Path, *, model: torch.nn.Module | None = None) -> Path:
    """Write a tiny random Llama (or `model`) with a byte-level tokenizer of 259 words; return the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if model is None:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=259,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=1024,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def tiny_moe(*, dense_layers: tuple[int, ...] = ()) -> torch.nn.Module:
    """Return a random Qwen3-MoE of 2 layers, whose experts are fused; `dense_layers` have an ordinary MLP instead."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # vLLM on a CPU has no smaller one
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=list(dense_layers),
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config)
