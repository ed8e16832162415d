"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098): ΔW = s (B₁ A₁) ⊙ (B₂ A₂); by PEFT."""

from typing import Any

from ba_lora.methods.base import Tuner, peft_settings, whole_alpha


class LoHa(Tuner):
    """2 r (in + out) parameters a layer."""

    peft_options = {"rank_dropout": (0.0, "[0, 1)")}
    bounds_rank = False
    layer_types = ("Linear",)

    def peft_config(self, num_steps: int) -> Any:
        from peft import LoHaConfig

        adapter = self.adapter
        return peft_settings(
            LoHaConfig, self, r=adapter.rank, alpha=whole_alpha(adapter), module_dropout=adapter.dropout
        )


TUNER = LoHa
