"""How far an export is from the trained model, by the logits of a few rows: the probe."""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ba_lora.config.methods import init_facts
from ba_lora.config.schema import RunConfig
from ba_lora.errors import UserError

if TYPE_CHECKING:
    import torch


FLOAT32_TOLERANCE = 1e-3  # the largest |Δ logit| allowed in float32
# Above this share of what training changed an export is refused: ‖Δ logits‖ ÷ ‖trained − step 0‖ on the probe.
MAX_SHARE = 0.1
# What training changed less than so many units in the last place of the logits is too little to take a share of.
ULPS = {"float32": 64, "bfloat16": 4, "float16": 4}


class Parity(NamedTuple):
    """How far an export's logits are from the trained model's: the largest |Δ|, and its share of what training changed
    (None where that is unknown or too little)."""

    difference: float
    share: float | None

    def __str__(self) -> str:
        if self.share is None:
            return f"{self.difference:.2g}"
        return f"{self.difference:.2g} ({100 * self.share:.2g} % of what training changed)"


def report(parities: dict[str, Parity], config: RunConfig) -> dict[str, Any]:
    """Return what a result says of the exports.

    unquantized_logit_difference: of a quantised base, how far the trained model is from its float parent, the
    unquantised base with the same adapter. Not told of LoftQ, whose adapter makes up for the rounding as well.
    """
    told: dict[str, Any] = {
        "max_logit_difference": {name: parity.difference for name, parity in parities.items()},
        "share_of_learned_change": {name: parity.share for name, parity in parities.items()},
    }
    if config.model.quantization != "none" and not init_facts(config.adapter).get("corrects"):
        (parent,) = (parity for name, parity in parities.items() if name in ("adapter", "lora"))
        told["unquantized_logit_difference"] = parent.difference
    return told


def probe_batch(rows: list[dict[str, Any]], pad_token_id: int, *, num_rows: int = 2, length: int = 128) -> dict:
    """Return the first rows, cut to `length` tokens, as the batch on which models are compared."""
    import torch

    ids = [row["input_ids"][:length] for row in rows[:num_rows]]
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }


def compare_logits(
    name: str,
    exported: "torch.Tensor",
    trained: "torch.Tensor",
    initial: "torch.Tensor | None",
    config: RunConfig,
    run_path: Path,
) -> Parity:
    """Return how far an export's logits are from the trained model's. Raises UserError where that is too far.

    Allowed are `export.tolerance` where it is given; in float32 `FLOAT32_TOLERANCE`; and everywhere `MAX_SHARE` of what
    training changed, or, where that is hardly anything, `ULPS`. An adapter from a quantised base is compared on the
    unquantised one, and measured, not judged.
    """
    import torch

    from ba_lora.models.load import torch_dtype

    difference = (exported - trained).abs().max().item()
    rounding = ULPS[config.model.dtype] * torch.finfo(torch_dtype(config.model.dtype)).eps * trained.abs().max().item()
    share = None
    if initial is not None and (trained - initial).abs().max().item() > rounding:
        share = ((exported - trained).norm() / (trained - initial).norm()).item()
    parity = Parity(difference, share)
    if config.export.tolerance is not None:
        allowed, is_near = f"{config.export.tolerance:.3g}", difference <= config.export.tolerance
    elif config.model.quantization != "none" and name != "merged":
        allowed, is_near = "any", not math.isnan(difference)
    elif share is not None and share > MAX_SHARE:
        allowed, is_near = f"{MAX_SHARE:.0%} of that change", False
    else:
        largest = math.inf if share is not None else rounding
        if config.model.dtype == "float32":
            largest = FLOAT32_TOLERANCE
        allowed, is_near = f"{largest:.3g}", difference <= largest
    if not is_near:  # NaN fails too
        rejected = run_path / f"{name}.rejected"
        shutil.rmtree(rejected, ignore_errors=True)
        (run_path / name).rename(rejected)
        remedy = "" if config.model.dtype == "float32" else "model.dtype=float32 loses nothing, and "
        raise UserError(
            f"the exported {name}/ differs from the trained model by {parity} in its logits, allowed are {allowed}: "
            f"it is kept as {rejected.name}/; {remedy}a larger export.tolerance (in logits) accepts it"
        )
    return parity
