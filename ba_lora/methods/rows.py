"""Batches of tokenized training rows for the inits that run some before training."""

import random
from typing import TYPE_CHECKING

import torch

from ba_lora.methods.base import TrainingRows

if TYPE_CHECKING:
    from torch import Tensor, nn


def batches(model: "nn.Module", rows: TrainingRows, *, num_rows: int, batch_size: int) -> "list[dict[str, Tensor]]":
    """Return rows drawn by the seed as batches on the model's device, padded on the right; all rows where there are
    fewer. Columns are the model's own: input_ids, attention_mask, labels (of tokens, or a row's class)."""
    chosen = random.Random(rows.seed).sample(range(len(rows.dataset)), min(num_rows, len(rows.dataset)))
    columns = [c for c in ("input_ids", "attention_mask", "token_type_ids", "labels") if c in rows.dataset.column_names]
    padding = {"input_ids": getattr(model.config, "pad_token_id", None) or 0, "labels": -100}
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(chosen), batch_size):
        some = rows.dataset.select(chosen[start : start + batch_size]).to_list()
        longest = max(len(row["input_ids"]) for row in some)
        batch = {}
        for column in columns:
            values = [row[column] for row in some]
            if isinstance(values[0], list):
                values = [value + [padding.get(column, 0)] * (longest - len(value)) for value in values]
            batch[column] = torch.tensor(values, device=device)
        found.append(batch)
    return found
