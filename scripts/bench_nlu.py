"""What scripts/bench.py measures of NLU: a BERT of random weights under stock PiSSA and under BA-LoRA's NLU loss.

pissa           Trainer + PEFT as anyone would write them
lora            the same without PiSSA's initialisation
ba_lora         BALoRATrainer (paper2024): a reference pass in every step, terms on the logits
ba_lora_cache   the same with the reference's features from disk (`reference.cache`)
ba_lora_pooled  ba_lora with diversity and svd on the pooled features, where no term is constant
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

PISSA = ("pissa",)
CASES = (*PISSA, "lora", "ba_lora", "ba_lora_cache", "ba_lora_pooled")
FILLED_BEFORE: tuple[str, ...] = ()  # the trainer fills its cache itself, before its first step


@dataclass(frozen=True)
class EncoderShape:
    """A BERT of random weights with a new head of `labels`, and its micro-batch of rows of full length."""

    vocabularies: tuple[int, ...]
    hidden: int
    layers: int
    heads: int
    intermediate: int
    batch: int
    length: int
    rank: int
    labels: int = 3
    cases: tuple[str, ...] = CASES

    def lengths(self, case: str) -> list[int]:
        """Return the tokens of each row of a micro-batch."""
        return [self.length] * self.batch


SHAPES = {
    "minilm-nlu": EncoderShape((30_522,), 384, 6, 12, 1536, batch=16, length=96, rank=8),
    "toy-nlu": EncoderShape((512,), 64, 2, 2, 96, batch=4, length=16, rank=4),
}


def build_trainer(case: str, shape: EncoderShape, vocabulary: int, device: str, folder: Path) -> "Trainer":
    """Return the case's trainer; its rows are the same micro-batch shapes over and over."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, Trainer, default_data_collator, set_seed

    from ba_lora.config.schema_nlu import NLURegularizersConfig
    from ba_lora.objective.objective_nlu import ClassifierObjective
    from ba_lora.objective.reference_cache.features import CachedFeatures
    from ba_lora.training.trainer import BALoRATrainer
    from scripts.bench_cases import training_arguments

    set_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        num_labels=shape.labels,
    )
    adapter = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.rank,
        target_modules=r"bert\.encoder\..*\.(query|key|value|dense)",  # neither the pooler nor the head
        init_lora_weights=True if case == "lora" else "pissa",
        task_type="SEQ_CLS",
    )
    model = get_peft_model(BertForSequenceClassification(config).to(device), adapter)
    arguments = training_arguments(folder / case, batch=shape.batch, device=device)
    data = {"train_dataset": random_rows(shape, vocabulary), "data_collator": default_data_collator}
    if case in ("pissa", "lora"):
        return Trainer(model, arguments, **data)
    cache = CachedFeatures(folder, {"shape": repr(shape), "vocabulary": vocabulary})
    objective = ClassifierObjective(
        model,
        NLURegularizersConfig(features="pooled" if case == "ba_lora_pooled" else "logits"),
        micro_batch=shape.batch,
        cache=cache if case == "ba_lora_cache" else None,
    )
    return BALoRATrainer(model, arguments, objective=objective, **data)


def random_rows(shape: EncoderShape, vocabulary: int) -> "Dataset":
    """Return numbered random rows for 4 micro-batches."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    rows: list[dict[str, Any]] = []
    for number in range(4 * shape.batch):
        ids = torch.randint(3, vocabulary, (shape.length,), generator=generator).tolist()
        mask = {"token_type_ids": [0] * shape.length, "attention_mask": [1] * shape.length}
        rows.append({"input_ids": ids, **mask, "labels": number % shape.labels, "row": number})
    return Dataset.from_list(rows)


def operations(case: str, shape: EncoderShape, vocabulary: int) -> float:
    """Return the multiply-adds of a step's matrix products, counted as bench_cases.operations does; no head to speak
    of."""
    tokens = shape.batch * shape.length
    linears = [(shape.hidden, shape.hidden)] * 4 + [(shape.hidden, shape.intermediate)] * 2
    frozen = shape.layers * sum(i * o for i, o in linears)
    factors = shape.layers * sum(shape.rank * (i + o) for i, o in linears)
    forward = tokens * (frozen + factors)
    step = forward + tokens * (frozen + 2 * factors)
    return step + forward if case in ("ba_lora", "ba_lora_pooled") else step
