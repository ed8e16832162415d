"""MiSS (Kang & Yin 2024, arXiv 2409.15371): ΔW[o, j] = D[j mod r, o], one trained matrix D [r, out] = 0; by PEFT."""

from typing import Any

from ba_lora.errors import UserError
from ba_lora.methods.base import Tuner, peft_settings


class Miss(Tuner):
    """r · out parameters a layer, r at most `in`. `init_weights`: true, or PEFT's variants: `bat` (r · out, blocks of
    r × r) and `mini` (r · mini_r, D repeated over the outputs too)."""

    options = {"init_weights": (True, (True, "bat", "mini")), "mini_r": (1, "[1, 1000000]")}
    option_needs = {"mini_r": ("init_weights", "mini")}
    ignores = ("alpha",)
    layer_types = ("Linear",)
    draws = None

    def largest_rank(self, num_in: int, num_out: int) -> int:
        """Raises UserError for a layer that a variant cannot divide."""
        rank, variant, mini_r = self.adapter.rank, self.option["init_weights"], self.option["mini_r"]
        if variant == "bat" and (num_in % rank or num_out % rank):
            raise UserError(
                f"adapter.options.init_weights=bat needs an adapter.rank that divides every layer, and {rank} does not "
                f"divide one of {num_in} inputs and {num_out} outputs"
            )
        if variant == "mini" and num_out % mini_r:
            raise UserError(f"adapter.options.mini_r={mini_r} does not divide a layer of {num_out} outputs")
        return num_in

    def peft_config(self, num_steps: int) -> Any:
        from peft import MissConfig

        adapter = self.adapter
        return peft_settings(MissConfig, self, r=adapter.rank, miss_dropout=adapter.dropout, **self.option)


TUNER = Miss
