"""How a language model's loss is computed: by which pass, and by which of the two losses. Chosen once, at the start.

    fused     hidden states before the head, the loss fused with a frozen linear head (losses/fused.py)
    plain     hidden states before the head, then all logits (losses/plain.py)
    logits    the model's own logits: architectures that change them after the head (soft-capping, scaling), and the
              plain loss under ZeRO-3, which frees the head's weight between forward and backward

Legend: N response positions; T tokens; D hidden size; V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ba_lora.config.schema_nlg import LossConfig
from ba_lora.models.layers import gathered
from ba_lora.objective.losses.fused import default_chunk_memory_mb, fused_loss
from ba_lora.objective.losses.plain import TermSums, plain_loss
from ba_lora.objective.losses.svd import head_factor, same_singular_values, why_not_frozen_linear
from ba_lora.objective.terms.base import PositionTerm
from ba_lora.objective.terms.block import Positions

logger = logging.get_logger(__name__)

Head = Callable[[Tensor], Tensor]


class LossPath:
    """The plain path; the others say what differs. `why_plain` is the reason against the fused loss."""

    def __init__(self, base: nn.Module, accelerator: Accelerator, *, why_plain: str | None = None) -> None:
        self._accelerator = accelerator
        self._arguments = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            self._arguments["logits_to_keep"] = 1  # spares the model's own logits
        self._why_plain = why_plain
        self._factor_DD: Tensor | None = None
        self._knows_factor = False

    def states(self, module: nn.Module, inputs: dict[str, Tensor], mask_BT: Tensor) -> tuple[Tensor, Head]:
        """Return what goes into the head at the positions of the mask [N, D], and the head, by a pass of `module`.

        The mask's are the last positions: virtual tokens may stand before them.
        """
        head, hidden_BTD, _ = self.last_hidden(module, inputs)
        return hidden_BTD[:, -mask_BT.shape[1] :][mask_BT], head

    def last_hidden(self, module: nn.Module, inputs: dict[str, Tensor]) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the head, what goes into it [B, T, D], and the logits that the model itself makes of it."""
        base = base_model(self._accelerator, module)
        caught = {}

        def catch(_module: nn.Module, _args: tuple, output: Any) -> None:
            caught["hidden"] = output[0] if isinstance(output, tuple) else output.last_hidden_state

        handle = base.get_decoder().register_forward_hook(catch)
        try:
            logits_BTV = module(**inputs, **self._arguments).logits
        finally:
            handle.remove()
        return base.get_output_embeddings(), caught["hidden"], logits_BTV

    def loss(
        self,
        states_ND: Tensor,
        head: Head,
        positions: Positions,
        terms: Sequence[PositionTerm],
        factors: Mapping[str, float | Tensor],
        *,
        reference_head: Head | None,
    ) -> tuple[Tensor, dict[str, TermSums]]:
        """Return the weighted sum of the position terms, and each term's sums."""
        return plain_loss(states_ND, head, positions, terms, factors, reference_head=reference_head)

    def matrix(self, states_ND: Tensor, head: Head) -> Tensor:
        """Return a matrix with the singular values of the logits: without the vocabulary where the head allows it."""
        if not self._knows_factor:
            with torch.autocast(states_ND.device.type, enabled=False):
                self._factor_DD = head_factor(head)
            self._knows_factor = True
            if self._factor_DD is None:
                logger.warning("the svd term is taken from the logits: no whole, frozen, linear head is at hand")
        return head(states_ND) if self._factor_DD is None else same_singular_values(states_ND, self._factor_DD)

    def report(self) -> dict[str, Any]:
        """Return how the loss is computed, for the run's result."""
        return {"implementation": "plain", "why_plain": self._why_plain}


class FusedPath(LossPath):
    """The fused loss, for a frozen linear head."""

    def __init__(self, base: nn.Module, accelerator: Accelerator, *, chunk_memory_mb: float | None) -> None:
        super().__init__(base, accelerator)
        self._chunk_memory_mb = chunk_memory_mb or default_chunk_memory_mb(accelerator.device.type)

    def loss(
        self,
        states_ND: Tensor,
        head: nn.Linear,
        positions: Positions,
        terms: Sequence[PositionTerm],
        factors: Mapping[str, float | Tensor],
        *,
        reference_head: Head | None,
    ) -> tuple[Tensor, dict[str, TermSums]]:
        return fused_loss(states_ND, head, positions, terms, factors, chunk_memory_mb=self._chunk_memory_mb)

    def report(self) -> dict[str, Any]:
        return {"implementation": "fused", "chunk_memory_mb": self._chunk_memory_mb}


class LogitsPath(LossPath):
    """The plain loss from the model's own logits, with the identity as head."""

    def states(self, module: nn.Module, inputs: dict[str, Tensor], mask_BT: Tensor) -> tuple[Tensor, Head]:
        return module(**inputs, use_cache=False).logits[:, -mask_BT.shape[1] :][mask_BT], identity


def choose_path(
    model: nn.Module, inputs: dict[str, Tensor], *, config: LossConfig, accelerator: Accelerator
) -> LossPath:
    """Return the path for `model` (wrapped or not); a pass over `inputs` shows if the head's output is the logits.

    Soft-capping is asked for by name too: it hardly changes small logits.
    """
    base = base_model(accelerator, model)
    head = base.get_output_embeddings()
    why = "loss.implementation=plain" if config.implementation == "plain" else why_not_frozen_linear(head)
    if why is not None and is_deepspeed_zero3_enabled():
        return _told(LogitsPath(base, accelerator, why_plain=why), why)
    path = LossPath(base, accelerator, why_plain=why)
    with torch.no_grad(), evaluating(model), accelerator.autocast():
        head, hidden_BTD, logits_BTV = path.last_hidden(model, inputs)
        with whole(head):
            ours, theirs = head(hidden_BTD[:, -1]), logits_BTV[:, -1].float()
    tolerance = (1e-4 if ours.dtype.itemsize >= 4 else 0.02) * theirs.abs().max().clamp(min=1.0)
    capped = getattr(base.config.get_text_config(), "final_logit_softcapping", None) is not None
    if capped or not bool((ours.float() - theirs).abs().max() <= tolerance):
        why = "this architecture changes its logits after the head"
        return _told(LogitsPath(base, accelerator, why_plain=why), why)
    if why is not None:
        return _told(path, why)
    return FusedPath(base, accelerator, chunk_memory_mb=config.chunk_memory_mb)


def _told(path: LossPath, why: str) -> LossPath:
    if why != "loss.implementation=plain":
        logger.warning(f"the loss is taken from all logits, at their price: {why}")
    return path


def base_model(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Return the transformers model inside what accelerate, DeepSpeed and PEFT have wrapped."""
    module = accelerator.unwrap_model(module, keep_torch_compile=False)
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def whole(head: Head) -> contextlib.AbstractContextManager[None]:
    """Hold the head's weight together while the loss reads it, where ZeRO-3 has split it."""
    return gathered(list(head.parameters()) if isinstance(head, nn.Module) else [], modify=False)


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Run a pass in evaluation mode: dropout, of modules or inside attention, would be noise in it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def identity(tensor: Tensor) -> Tensor:
    return tensor
