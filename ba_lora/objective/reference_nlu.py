"""The pre-trained model's logits for the consistency term of an NLU run: its frozen features under one of three heads.

    initial   the head as it was drawn: the very same draw as the tuned model's
    shared    the head as it is now
    probe     a linear head, fitted on the frozen features before training

The features come from the shared base (`reference.Reference`), by a pass of their own in each step, or from a cache
(`reference.cache=DIR`, reference_cache/features.py), which the first run fills by one pass over its training rows.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.models.classifier import Head, live_head, run_head, unwrapped
from ba_lora.models.predict import predict
from ba_lora.objective.reference import Reference
from ba_lora.objective.reference_cache.features import CachedFeatures

if TYPE_CHECKING:
    from datasets import Dataset

PROBE_ROWS = 10_000  # at most so many training rows, evenly spaced, fit the probe
PROBE_PENALTY = 1e-3  # of ½ ‖W‖² on standardised features


class ReferenceLogits:
    """Z_P for a micro-batch. `prepare` comes before the first step, while the model is still untrained."""

    def __init__(self, model: nn.Module, reference: Reference, *, head: str, cache: CachedFeatures | None) -> None:
        self._reference = reference
        self._kind = head
        self._head = Head(live_head(model)) if head == "initial" else None
        self._cache = cache
        self._cached: Tensor | None = None  # logits for heads that stay as they are, features for the shared one
        self._place_of_row: dict[int, int] = {}

    @property
    def is_cached(self) -> bool:
        """Whether the cache serves: then only the rows that `prepare` was given have a reference."""
        return self._cached is not None

    def prepare(self, model: nn.Module, rows: "Dataset", collate: Callable, *, batch_size: int) -> None:
        """Fit the probe and fill the cache, where they are asked for; every process calls it, under the autocast that
        training will run under."""
        self._reference.to(next(model.parameters()).device)
        if self._kind == "probe" and self._head is None:
            chosen = rows.select(range(0, len(rows), -(-len(rows) // PROBE_ROWS)))
            with self._reference.use(model) as module:
                pooled_NH = predict(module, chosen, collate, batch_size=batch_size).pooled
            num_labels = unwrapped(model).config.num_labels
            self._head = Head([fit_probe(pooled_NH, torch.tensor(chosen["labels"]), num_labels=num_labels)])
        if self._head is not None:
            self._head.to(next(model.parameters()).device)
        if self._cache is not None and self._cached is None:
            self._read_or_fill(model, rows, collate, batch_size=batch_size)

    def __call__(self, model: nn.Module, rows_N: Tensor | None, pooled: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return Z_P [N, D] of the rows numbered `rows_N`; `pooled(module)` runs a pass over them. No gradient.

        `model` is in evaluation mode; `pooled` is called only where the cache does not serve. Raises UserError for rows
        that the cache does not hold.
        """
        with torch.no_grad():
            if self._cached is not None:
                known = self._cached[self._places(rows_N)]
                return known if self._head is not None else run_head(live_head(model), known)
            with self._reference.use(model) as module:
                pooled_NH = pooled(module)
            return self._head(pooled_NH) if self._head is not None else run_head(live_head(model), pooled_NH)

    def _places(self, rows_N: Tensor | None) -> Tensor:
        """Return where in the cache the rows lie, [N]."""
        places = [None] if rows_N is None else [self._place_of_row.get(row) for row in rows_N.tolist()]
        if None in places:
            raise UserError("the training rows are not those of the reference cache: give it that data set as it is")
        return torch.tensor(places, device=self._cached.device)

    def _read_or_fill(self, model: nn.Module, rows: "Dataset", collate: Callable, *, batch_size: int) -> None:
        """Read the features where a run has written them already, else compute and write them."""
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        device = next(model.parameters()).device
        is_there = [self._cache.path.is_file()]
        broadcast_object_list(is_there)  # one looks for all: another run may write it at any moment
        if is_there[0]:
            values = self._cache.read(num_rows=len(rows), hidden_size=unwrapped(model).config.hidden_size)
        else:
            with self._reference.use(model) as module:
                values = predict(module, rows, collate, batch_size=batch_size).pooled
            if PartialState().is_main_process:
                self._cache.write(values)
        if self._head is not None:
            with torch.no_grad():
                values = torch.cat([self._head(part.to(device)) for part in values.split(1024)])
        self._place_of_row = {row: place for place, row in enumerate(rows["row"])}
        self._cached = values.to(device)


def fit_probe(pooled_NH: Tensor, labels_N: Tensor, *, num_labels: int) -> nn.Linear:
    """Return the linear head that fits `labels_N` (classes) from `pooled_NH` best: logistic regression with a small
    ridge penalty on standardised features, by L-BFGS in float64."""
    features_NH = pooled_NH.double()
    mean_H, std_H = features_NH.mean(0), features_NH.std(0).clamp(min=1e-6)
    features_NH = (features_NH - mean_H) / std_H
    weight_DH = torch.zeros(num_labels, features_NH.shape[1], dtype=torch.float64, requires_grad=True)
    bias_D = torch.zeros(num_labels, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_DH, bias_D], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features_NH @ weight_DH.T + bias_D, labels_N)
        value = value + 0.5 * PROBE_PENALTY * weight_DH.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    probe = nn.Linear(features_NH.shape[1], num_labels).requires_grad_(False)
    with torch.no_grad():
        weight_DH = weight_DH / std_H
        probe.weight.copy_(weight_DH)
        probe.bias.copy_(bias_D - weight_DH @ mean_H)
    return probe
