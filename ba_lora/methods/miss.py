"""MiSS (Kang & Yin 2024, arXiv 2409.15371): ΔW[o, j] = D[j mod r, o], one trained matrix D [r, out] = 0; by PEFT."""

from typing import Any

from ba_lora.methods.base import Tuner, peft_settings


class Miss(Tuner):
    """r · out parameters a layer, r at most `in`; `init_weights`: true, or `bat` or `mini`, PEFT's variants."""

    options = {"init_weights": (True, (True, "bat", "mini")), "mini_r": (None, None)}
    layer_types = ("Linear",)
    draws = None

    def largest_rank(self, num_in: int, num_out: int) -> int:
        return num_in

    def peft_config(self, num_steps: int) -> Any:
        from peft import MissConfig

        adapter = self.adapter
        return peft_settings(
            MissConfig, adapter, known=self.options, r=adapter.rank, miss_dropout=adapter.dropout, **self.option
        )


TUNER = Miss
