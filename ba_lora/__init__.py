"""BA-LoRA: bias-alleviating low-rank adaptation (arXiv 2408.04556).

from ba_lora import BALoRAConfig, BALoRATrainer, export_lora
trainer = BALoRATrainer(peft_model, training_arguments, regularizers=BALoRAConfig(), train_dataset=…)
trainer.train()
export_lora(trainer, "outputs/lora")  # a plain LoRA on the untouched base, for any PEFT or vLLM
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

# Other libraries import DeepSpeed wherever it is installed, and without a GPU it warns in every run.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

if TYPE_CHECKING:
    from ba_lora.config.schema import BALoRAConfig
    from ba_lora.runs.export import export_lora
    from ba_lora.training.mixin import BALoRALoss
    from ba_lora.training.sft import BALoRASFTTrainer
    from ba_lora.training.trainer import BALoRATrainer

__all__ = ["BALoRAConfig", "BALoRALoss", "BALoRASFTTrainer", "BALoRATrainer", "export_lora"]
_MODULES = {
    "BALoRAConfig": "config.schema",
    "BALoRALoss": "training.mixin",
    "BALoRASFTTrainer": "training.sft",
    "BALoRATrainer": "training.trainer",
    "export_lora": "runs.export",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the evaluators import ba_lora too and need neither torch nor transformers."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"ba_lora.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'ba_lora' has no attribute {name!r}")
