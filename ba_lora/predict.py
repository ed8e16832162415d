"""A classifier's logits and pooled features for many rows, in one pass, batched by length."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ba_lora.classifier import catch_pooled

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Predictions:
    """Float32, on the CPU, in the order of the rows: logits [N, D] and pooled features [N, hidden]."""

    logits: Tensor
    pooled: Tensor


def predict(
    model: nn.Module, rows: "Dataset", collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]], *, batch_size: int
) -> Predictions:
    """Run `model` in evaluation mode over `rows` (of input_ids and what else the tokenizer made).

    Every process calls it, takes its share of the batches and gets all predictions. The batches do not depend on the
    number of processes.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    process = PartialState()
    device = next(model.parameters()).device
    inputs = [name for name in rows.column_names if name in ("input_ids", "attention_mask", "token_type_ids")]
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
            with catch_pooled(model, tensors) as caught:
                logits = model(**tensors).logits
            found.append((batch, logits.float().cpu(), caught["pooled"].float().cpu()))
    model.train(training)
    if process.num_processes > 1:
        found = gather_object(found)
    places = torch.tensor([index for batch, _, _ in found for index in batch]).argsort()
    return Predictions(
        logits=torch.cat([logits for _, logits, _ in found])[places],
        pooled=torch.cat([pooled for _, _, pooled in found])[places],
    )
