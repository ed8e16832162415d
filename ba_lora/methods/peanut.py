"""PEANuT, first called NEAT (Zhong et al. 2024, arXiv 2410.01870): ΔW = s B f(A W), a small network of the weight.

A [r, out] is random, B [out, r] = 0; `depth` layers more have r × r matrices with a residual. By PEFT, as in the code
of the paper's NLU runs. Their code for language models is another form, f(W A) B with A over the inputs; and ΔW is
built again in every pass, which takes the memory of the weights.
"""

from typing import Any

from ba_lora.methods.base import Tuner, peft_settings


class Peanut(Tuner):
    """2 r out + 2 depth r² parameters a layer; `scaling` is s, whatever adapter.alpha is."""

    ignores = ("alpha",)
    bounds_rank = False
    peft_options = {
        "depth": (0, "[0, 1000]"),
        "act_fn": ("relu", ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")),
        "scaling": (1.0, "(0, 1000000]"),
    }
    layer_types = ("Linear",)
    has_dropout = False
    no_zero3 = "PEANuT reads whole weights in each pass, which ZeRO-3 splits: use ZeRO-2, DDP or one process"

    def peft_config(self, num_steps: int) -> Any:
        from peft import PeanutConfig

        return peft_settings(PeanutConfig, self, r=self.adapter.rank)


TUNER = Peanut
