"""(IA)³ (Liu et al. 2022, arXiv 2205.05638): activations are scaled, y = l ⊙ (W x + b), in an MLP's last layer
y = W (l ⊙ x) + b; l = 1 at the start. By PEFT.

On which layers: `adapter.target_modules`; the paper's are keys, values and the MLP's last layer. PEFT cannot load an
adapter again whose layers it found by `all-linear`: it is given whole paths.
"""

from typing import Any

from ba_lora.methods.base import Tuner, peft_settings

# The MLP's last layer, by the ends of its path in the architectures of configs/.
LAST_OF_MLP = ("mlp.down_proj", "mlp.c_proj", "output.dense", "DenseReluDense.wo", "ff.wo", "mlp.fc2", "w2")
NOT_LAST = ("attention.output.dense",)


class IA3(Tuner):
    """out parameters a layer, in for an MLP's last layer."""

    ignores = ("rank", "alpha")
    names_layers = True
    has_dropout = False
    draws = None

    def peft_config(self, num_steps: int) -> Any:
        from peft import IA3Config

        return peft_settings(IA3Config, self, feedforward_modules=[], target_modules=[])

    def set_layers(self, peft_config: Any, targets: list[str]) -> None:
        peft_config.feedforward_modules = {
            path for path in targets if path.endswith(LAST_OF_MLP) and not path.endswith(NOT_LAST)
        }


TUNER = IA3
