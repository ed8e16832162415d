"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): ΔW = Λ_b B Λ_d A with random, frozen A and B that all layers share.

Trained are two vectors a layer, b [out] = 0 and d [r] = 0.1, so that the rank is large (256) and the learning rate 10
to 100 times LoRA's. By PEFT; A and B are drawn again from `projection_prng_key`, and not saved.
"""

from typing import Any

from ba_lora.methods.base import Tuner, peft_settings


class Vera(Tuner):
    """out + r parameters a layer."""

    peft_options = {"d_initial": (0.1, "(0, 1000000]"), "projection_prng_key": (0, "[0, 4294967295]")}
    layer_options = ("layers_to_transform", "layers_pattern")
    draws = None
    ignores = ("alpha",)
    bounds_rank = False

    def peft_config(self, num_steps: int) -> Any:
        from peft import VeraConfig

        adapter = self.adapter
        return peft_settings(VeraConfig, self, r=adapter.rank, vera_dropout=adapter.dropout, save_projection=False)


TUNER = Vera
