"""The model that a run starts from: a causal language model, or for NLU an encoder with the task's new head."""

from typing import TYPE_CHECKING

from ba_lora.config.schema import RunConfig
from ba_lora.models.load import check_hardware, load_model, torch_dtype, without_load_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_base(config: RunConfig, *, source: str | None = None, quantize: bool = True) -> "PreTrainedModel":
    """Return the model a run starts from: a causal language model, or for NLU one with the task's head."""
    if config.kind == "nlu":
        from ba_lora.models.classifier import load_classifier

        check_hardware(config.model)
        return load_classifier(config, source=source, quantize=quantize)
    return load_model(config.model, source=source, quantize=quantize)


def load_dequantized(config: RunConfig, *, source: str | None = None) -> "PreTrainedModel":
    """Return the quantised model with its weights written out again in `model.dtype`: the same function, no longer
    small."""
    model = load_base(config, source=source)
    with without_load_report():
        return model.dequantize(dtype=torch_dtype(config.model.dtype))
