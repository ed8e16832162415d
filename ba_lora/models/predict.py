"""A classifier's logits and pooled features for many rows, in one pass, batched by length; predictions as lines."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ba_lora.io import finite
from ba_lora.models.classifier import catch_pooled

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Predictions:
    """Float32, on the CPU, in the order of the rows: logits [N, D], and pooled features [N, hidden] where asked for."""

    logits: Tensor
    pooled: Tensor | None


def predict(
    model: nn.Module,
    rows: "Dataset",
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    *,
    batch_size: int,
    pooled: bool = True,
) -> Predictions:
    """Run `model` in evaluation mode over `rows` (of input_ids and what else the tokenizer made).

    Every process calls it, takes its share of the batches and gets all predictions. The batches do not depend on the
    number of processes. pooled=False: without features, which would fill the memory for sets of many rows.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    process = PartialState()
    model = getattr(model, "module", model)  # DDP's own forward waits for the others, who may have fewer batches
    device = next(model.parameters()).device
    inputs = input_columns(rows)
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lambda index: (-lengths[index], index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rows = rows.select_columns(inputs)
    training = model.training
    model.eval()
    found = []
    with torch.no_grad():
        for batch in batches[process.process_index :: process.num_processes]:
            tensors = {name: tensor.to(device) for name, tensor in collate([rows[index] for index in batch]).items()}
            with catch_pooled(model, tensors) if pooled else contextlib.nullcontext() as caught:
                logits = model(**tensors).logits
            found.append((batch, logits.float().cpu(), caught["pooled"].float().cpu() if pooled else None))
    model.train(training)
    if process.num_processes > 1:
        found = gather_object(found)
    places = torch.tensor([index for batch, _, _ in found for index in batch]).argsort()
    return Predictions(
        logits=torch.cat([logits for _, logits, _ in found])[places],
        pooled=torch.cat([features for _, _, features in found])[places] if pooled else None,
    )


def input_columns(rows: "Dataset") -> list[str]:
    """Return the columns that a model reads, which the tokenizer made."""
    return [name for name in rows.column_names if name in ("input_ids", "attention_mask", "token_type_ids")]


def predicted_values(logits_ND: Tensor) -> tuple[list[float], int]:
    """Return class ids (or the one logit, for regression) and how many rows have logits that are NaN or infinite."""
    invalid = int((~logits_ND.isfinite().all(dim=1)).sum())
    values = logits_ND[:, 0] if logits_ND.shape[1] == 1 else logits_ND.argmax(dim=1)
    return values.tolist(), invalid


def prediction_lines(task_ids: Sequence[str], labels: Sequence[float], logits_ND: Tensor) -> list[dict[str, Any]]:
    """Return one line a row: task_id, label, prediction (None where the logits are not finite) and logits."""
    values, _ = predicted_values(logits_ND)
    lines = []
    for task_id, label, value, logits in zip(task_ids, labels, values, logits_ND.tolist(), strict=True):
        valid = all(map(math.isfinite, logits))
        lines.append(
            {
                "task_id": task_id,
                "label": label,
                "prediction": value if valid else None,
                "logits": finite([round(x, 6) if math.isfinite(x) else x for x in logits]),
            }
        )
    return lines
