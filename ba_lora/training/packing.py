"""Micro-batches without padding: their rows one after the other in one sequence [1, T], each for itself.

A packed micro-batch holds the very rows that the padded one would hold, in the same order. So every term, the svd term
of the micro-batch too, every seed and the effective batch mean what they mean with padding; only rounding differs (and
the draws of dropout, whose masks have other shapes). What keeps the rows apart:

    position ids      start at 0 in every row; transformers makes the block-diagonal causal mask from them
    row borders       `cu_seq_lens_*`, which flash-attention takes as they are, and `packed_sdpa` below
    labels            the first of every row is −100: no position predicts the row after its own

Source of the format: transformers' DataCollatorWithFlattening.
"""

import functools
import inspect
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorForSeq2Seq, DataCollatorWithFlattening
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ba_lora.errors import UserError
from ba_lora.models.load import flash_attention_lacks
from ba_lora.objective.regularizers import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ba_lora.config.schema import ModelConfig

PACKED_SDPA = "packed_sdpa"
# How far a row's logits may move when another row is packed before it, relative to their norm: rounding.
_LARGEST_CHANGE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


class PackingCollator(DataCollatorWithFlattening):
    """Rows → input_ids, labels, position_ids [1, T] and the row borders; a column of one number a row stays [rows]."""

    def __init__(self) -> None:
        super().__init__(return_flash_attn_kwargs=True, separator_id=IGNORE_INDEX)

    def __call__(self, features: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        batch = super().__call__(features, **settings)
        numbers = [name for name, value in features[0].items() if isinstance(value, int)]
        return batch | {name: torch.tensor([row[name] for row in features]) for name in numbers}


def build_collator(tokenizer: "PreTrainedTokenizerBase", *, packing: bool) -> Any:
    """Return what makes a micro-batch of rows: packed, or padded on the right to the longest row."""
    return PackingCollator() if packing else DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX)


def faster_attention(config: "ModelConfig", device: torch.device) -> str | None:
    """Return a hint where packed rows could go through flash-attention and do not, None where they cannot or do.

    The setting is left to the user: it is part of a run's hash.
    """
    if config.attention != "sdpa" or device.type != "cuda" or flash_attention_lacks(config.dtype):
        return None
    return "data.packing: sdpa takes the rows one by one, model.attention=flash_attention_2 is faster here"


def prepare_packing(model: nn.Module, rows: list[list[int]]) -> None:
    """Make `model` (plain or PEFT) ready for packed micro-batches, once, before the trainer is built.

    sdpa is replaced by `packed_sdpa`; flash-attention and eager attention do what is needed themselves. Then the last
    of `rows` (token ids) runs by itself and packed behind the first: where its logits depend on that, the architecture
    cannot be packed (no position ids, a recurrent state, attention that ignores the mask). Under ZeRO-3, where the
    model does not run outside the engine, only its forward's arguments are checked. Raises UserError.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = base.config.model_type
    refusal = f"data.packing=true would mix the rows of this {name} model: use data.packing=false"
    settings = base.config.get_text_config()
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UserError(f"{refusal} (it takes no position ids)")
    if getattr(settings, "attention_chunk_size", None):
        raise UserError(f"{refusal} (its attention's chunks ignore where a row starts)")
    if settings._attn_implementation == "sdpa":
        base.set_attn_implementation(PACKED_SDPA)
    if is_deepspeed_zero3_enabled():
        return
    change = _change_by_packing(base, rows[0], rows[-1])
    if not change <= _LARGEST_CHANGE[base.dtype]:
        raise UserError(f"{refusal} (packed behind another row, a row's logits change by {100 * change:.2g} %)")


@torch.no_grad()
def _change_by_packing(model: nn.Module, first: list[int], last: list[int]) -> float:
    """Return ‖packed − alone‖ / ‖alone‖ of the logits of the row `last`, packed behind the row `first`."""
    training = model.training
    model.eval()
    logits = []
    for rows in ([first, last], [last]):
        batch = PackingCollator()([{"input_ids": ids} for ids in rows])
        del batch["labels"]
        batch = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        logits.append(model(**batch, use_cache=False).logits[0, -len(last) :].float())
    model.train(training)
    packed, alone = logits
    return ((packed - alone).norm() / alone.norm()).item()


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, row by row where the borders of packed rows are given; query, key, value [1, heads, T, d].

    One call with the block-diagonal mask would be right too (and serves architectures that pass the borders not on),
    but costs T² where the rows cost Σ length², and a mask keeps sdpa from its causal kernel. A row longer than a
    sliding window takes its own block of the mask.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    window = settings.get("sliding_window")
    outputs = []
    for start, end in itertools.pairwise(_as_list(cu_seq_lens_q)):
        row = slice(start, end)
        mask = attention_mask[:, :, row, row] if window is not None and end - start > window else None
        output, _ = sdpa_attention_forward(module, query[:, :, row], key[:, :, row], value[:, :, row], mask, **settings)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


@functools.lru_cache(maxsize=1)
def _as_list(borders: Tensor) -> list[int]:
    """Fetch the borders from the device once a micro-batch (the very same tensor), not once a layer."""
    return borders.tolist()


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
