"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): trained embeddings stand before each input; by PEFT.

There is no layer to merge and no step 0 that is the pre-trained model: the virtual tokens are there from the start.
"""

from typing import Any, ClassVar

from ba_lora.errors import UserError
from ba_lora.methods.base import Tuner, peft_settings


class PromptTuning(Tuner):
    """tokens · hidden size parameters, drawn at random."""

    options = {"num_virtual_tokens": (20, "[1, 100000]")}
    config_class: ClassVar[str] = "PromptTuningConfig"
    kinds = ("nlg",)
    limits = "is for language models with whole weights: NLU compares adapters in the layers"
    layer_options = ()
    ignores = ("rank", "alpha", "target_modules")
    has_dropout = False
    merges = False
    packs = False
    recomputes = False
    no_deepspeed = "virtual tokens are not tried under DeepSpeed: use DDP or one process"

    def peft_config(self, num_steps: int) -> Any:
        import peft

        return peft_settings(getattr(peft, self.config_class), self, **self.option)

    def check_reference(self) -> None:
        raise UserError(
            "virtual tokens change the model before the first step: consistency with the pre-trained model would not "
            "begin at 0; set regularizers.lambda_consistency=0"
        )


TUNER = PromptTuning
