"""Full fine-tuning: every weight of the model is trained."""

from typing import TYPE_CHECKING

from ba_lora.methods.base import Tuner

if TYPE_CHECKING:
    from torch import nn


class OwnWeights(Tuner):
    """The model's own weights; `choose` says which are trained."""

    own_weights = True
    layer_options = ()
    ignores = ("rank", "alpha", "target_modules", "dtype")
    draws = None
    limits = "needs weights that can be trained, which quantised ones cannot: use adapter.tuner=lora"

    def choose(self, model: "nn.Module") -> None:
        """All of them."""


TUNER = OwnWeights
