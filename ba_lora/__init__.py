"""BA-LoRA: bias-alleviating low-rank adaptation (arXiv 2408.04556).

from ba_lora import BALoRAConfig, BALoRATrainer
trainer = BALoRATrainer(peft_model, training_arguments, regularizers=BALoRAConfig(), train_dataset=…)
"""

import logging
from typing import TYPE_CHECKING, Any

# Other libraries import DeepSpeed wherever it is installed, and without a GPU it warns in every run.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

if TYPE_CHECKING:
    from ba_lora.config import BALoRAConfig
    from ba_lora.trainer import BALoRATrainer

__all__ = ["BALoRAConfig", "BALoRATrainer"]


def __getattr__(name: str) -> Any:
    """Import on first use: the evaluators import ba_lora too and need neither torch nor transformers."""
    if name == "BALoRATrainer":
        from ba_lora.trainer import BALoRATrainer

        return BALoRATrainer
    if name == "BALoRAConfig":
        from ba_lora.config import BALoRAConfig

        return BALoRAConfig
    raise AttributeError(f"module 'ba_lora' has no attribute {name!r}")
