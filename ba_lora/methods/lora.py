"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + s B A x, s = α / r, B = 0 at the start; by PEFT.

With `rslora` s = α / √r (arXiv 2312.03732). With `dora` the rows of W + s B A get a trained length of their own
(arXiv 2402.09353): there is no plain LoRA of that model.
"""

from typing import Any

from ba_lora.methods.base import Tuner, peft_settings, whole_alpha


class Lora(Tuner):
    """LoRA, rsLoRA, DoRA, and what starts from other factors."""

    has_factors = True
    takes_dora = True
    quantizes = True
    plain_lora = "adapter"

    def peft_config(self, num_steps: int, **settings: Any) -> Any:
        from peft import LoraConfig

        adapter = self.adapter
        return peft_settings(
            LoraConfig,
            self,
            r=adapter.rank,
            lora_alpha=whole_alpha(adapter),
            lora_dropout=adapter.dropout,
            use_rslora=adapter.rslora,
            use_dora=adapter.dora,
            init_lora_weights=True,  # the factors of an init take their place
            **settings,
        )


TUNER = Lora
