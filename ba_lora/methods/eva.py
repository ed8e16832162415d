"""EVA (Paischer et al. 2024, arXiv 2410.07170): A₀ = the top right singular vectors of a layer's inputs on training
rows, centred on their mean; B₀ = 0, the base stays as it is. By PEFT.

Ranks go where the inputs' variance is: a layer has up to ρ r, some have none, all together L r, and α goes with them so
that s stays equal. Inputs are those at tokens that are trained on (NLU: all real tokens).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.io import folder_atomic, load_tensors
from ba_lora.methods.base import DEFAULT, Init, TrainingRows
from ba_lora.methods.pissa import named_adapter_layers
from ba_lora.methods.rows import batches
from ba_lora.models.layers import adapter_layers, factor_parameters
from ba_lora.processes import on_main_process

if TYPE_CHECKING:
    from ba_lora.config.schema import RunConfig


class Eva(Init):
    """`rows` training rows, `batch_size` of them at a time, until the directions no longer turn (cosine above τ)."""

    options = {
        "rho": (2.0, "[1, 1000]"),
        "tau": (0.99, "(0, 1)"),
        "rows": (1024, "[1, 10000000]"),
        "batch_size": (16, "[1, 100000]"),
    }
    residual = False
    needs_rows = True
    no_zero3 = "adapter.init=eva runs rows before training, which ZeRO-3's split weights cannot: use ZeRO-2"
    draws = "rows of EVA's inputs"

    def write_factors(self, model: nn.Module, path: Path, config: "RunConfig", rows: TrainingRows | None) -> None:
        self._check_sizes(model)
        found: dict[str, Tensor] = {}

        def compute() -> None:
            from peft.tuners.lora.eva import get_eva_state_dict

            self._set_config(model, label_mask=config.kind == "nlg")
            given = batches(model, rows, num_rows=self.option["rows"], batch_size=self.option["batch_size"])
            given = self._large_enough(given, config.kind)
            was_training = model.training
            model.eval()
            directions = get_eva_state_dict(model, given, gather_distributed_inputs=False, show_progress_bar=False)
            model.train(was_training)
            found.update({name: value.float().cpu().contiguous() for name, value in directions.items()})

        on_main_process(PartialState(), compute)
        if PartialState().is_main_process:
            with folder_atomic(path.parent) as folder:
                save_file(found, folder / path.name)
        PartialState().wait_for_everyone()

    def load_factors(self, model: nn.Module, path: Path) -> nn.Module:
        from peft import initialize_lora_eva_weights

        dtype = factor_parameters(adapter_layers(model)[0], DEFAULT)[0].dtype
        self._set_config(model, label_mask=True)
        device = next(model.parameters()).device
        directions = {name: value.to(device) for name, value in load_tensors(path).items()}
        initialize_lora_eva_weights(model, eva_state_dict=directions, show_progress_bar=False)
        for layer in adapter_layers(model):  # those of a new rank are made in the base's dtype
            for parameter in factor_parameters(layer, DEFAULT):
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(True)
        settings = model.peft_config[DEFAULT]  # from here on a LoRA with a rank for each layer
        if self.adapter.rslora:  # PEFT has made α go with the rank, and rsLoRA divides it by the rank's root
            settings.alpha_pattern = {
                name: alpha * (self.adapter.rank / settings.rank_pattern[name]) ** 0.5
                for name, alpha in settings.alpha_pattern.items()
            }
            for name, layer in named_adapter_layers(model):
                alpha = settings.alpha_pattern.get(name.removeprefix("base_model.model."), settings.lora_alpha)
                layer.lora_alpha[DEFAULT], layer.scaling[DEFAULT] = alpha, alpha / layer.r[DEFAULT] ** 0.5
        settings.init_lora_weights, settings.eva_config = True, None
        return model

    def _set_config(self, model: nn.Module, *, label_mask: bool) -> None:
        from peft.tuners.lora.config import EvaConfig

        settings = model.peft_config[DEFAULT]
        settings.init_lora_weights = "eva"
        settings.eva_config = EvaConfig(rho=self.option["rho"], tau=self.option["tau"], use_label_mask=label_mask)

    def _num_directions(self) -> int:
        """Return ρ r, the most directions of a layer, rounded as PEFT does."""
        return round(self.option["rho"] * self.adapter.rank)

    def _check_sizes(self, model: nn.Module) -> None:
        """Raises UserError for a layer with fewer inputs than directions."""
        for name, layer in named_adapter_layers(model):
            if self._num_directions() > layer.in_features:
                raise UserError(
                    f"adapter.init=eva takes {self._num_directions()} directions (ρ r) of a layer's inputs, and {name} "
                    f"has {layer.in_features} inputs: lower adapter.options.rho or adapter.rank"
                )

    def _large_enough(self, given: list[dict[str, Tensor]], kind: str) -> list[dict[str, Tensor]]:
        """Return the batches with at least ρ r tokens: PEFT passes over smaller ones, and where there is no other it
        goes round and round. Raises UserError where none is left."""
        needed = self._num_directions()
        counts = [int((b["labels"] != -100).sum() if kind == "nlg" else b["attention_mask"].sum()) for b in given]
        kept = [batch for batch, count in zip(given, counts, strict=True) if count >= needed]
        if not kept:
            raise UserError(
                f"adapter.init=eva needs batches of {needed} tokens (ρ r), the largest has {max(counts, default=0)}: "
                "raise adapter.options.batch_size"
            )
        return kept


INIT = Eva
