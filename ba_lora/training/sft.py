"""BALoRASFTTrainer: TRL's SFTTrainer under BA-LoRA's loss. Everything SFTTrainer does to the data stays as it is.

    from ba_lora import BALoRAConfig, BALoRASFTTrainer
    trainer = BALoRASFTTrainer(model, SFTConfig(…), regularizers=BALoRAConfig(), train_dataset=…, peft_config=…)

TRL is optional: pip install -e '.[trl]', in the project's folder.
"""

from ba_lora.errors import UserError
from ba_lora.training.mixin import BALoRALoss

try:
    from trl import SFTTrainer
except ImportError as error:
    raise UserError(
        "BALoRASFTTrainer needs TRL: pip install -e '.[trl]' in the project's folder, or pip install trl==1.16.0"
    ) from error


class BALoRASFTTrainer(BALoRALoss, SFTTrainer):
    """SFTTrainer under L = L_task + λ1 L_consistency + λ2 L_diversity + λ3 L_svd; see BALoRALoss."""
