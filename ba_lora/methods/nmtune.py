"""NMTune (Chen et al. 2023, arXiv 2309.17002): the pre-trained model stays as it is; its pooled features go through a
small trained MLP before the new head, under three terms that BA-LoRA's NLU terms come from. With F the features and
Z = MLP(F) of a micro-batch of M rows, D wide:

    consistency   mean over rows of ‖F/‖F‖ − Z/‖Z‖‖²
    covariance    Σ_{i≠j} C_ij² / D,   C = the covariance of Z over the rows
    dominance     −σ₁ / Σ σ of Z

each times `weight` (theirs: 0.01). It is made for noise in the pre-training data, and no gradient goes through the
encoder. The head's first module holds the MLP; there is no ordinary model to merge it into.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.methods.base import DEFAULT, Tuner, WeightTerm, peft_settings
from ba_lora.methods.own_layers import OwnConfig, OwnLayer, register_own


@dataclass
class NMTuneConfig(OwnConfig):
    """width: D, the hidden size of the encoder; the MLP is D → expansion · D → D."""

    width: int = 1
    expansion: float = 1.0


class NMTuneLayer(OwnLayer):
    """The head's first module behind the MLP; the module's trained copy is the adapter's, too."""

    adapter_layer_names = ("nmtune_mlp", "nmtune_head")
    merges = False

    def allocate(self, adapter: str, config: NMTuneConfig) -> None:
        device, hidden = next(self.base_layer.parameters()).device, round(config.expansion * config.width)
        self.nmtune_mlp[adapter] = nn.Sequential(
            nn.Linear(config.width, hidden, device=device), nn.ReLU(), nn.Linear(hidden, config.width, device=device)
        )
        self.nmtune_head[adapter] = copy.deepcopy(self.base_layer).float().requires_grad_(True)
        self.features: tuple[Tensor, Tensor] | None = None  # F and Z [M, D] of the last pass

    def adapted(self, adapter: str, x: Tensor) -> Tensor:
        mlp = self.nmtune_mlp[adapter]
        x = x.to(mlp[0].weight.dtype)
        mapped = mlp(x)
        self.features = (x.detach(), mapped) if x.ndim == 2 else (x[:, 0].detach(), mapped[:, 0])  # at [CLS]
        return self.nmtune_head[adapter](mapped)


register_own("nmtune", NMTuneConfig, NMTuneLayer)


class NMTune(Tuner):
    """2 · expansion · D² parameters and the biases, beside the head."""

    options = {"weight": (0.01, "[0, 1000000]"), "expansion": (1.0, "(0, 100]")}
    kinds = ("nlu",)
    limits = "maps a classifier's features: it is for NLU, with whole weights"
    layer_options = ()
    ignores = ("rank", "alpha", "target_modules")
    own_layers = True
    names_layers = True
    has_dropout = False
    merges = False
    holds_head = True
    term_names = ("nmtune_consistency", "nmtune_covariance", "nmtune_dominance")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._width = 0

    def chosen_layers(self, model: nn.Module, linear: dict[str, tuple[int, int]]) -> list[str]:
        """Raises UserError for a decoder, whose head runs on every token."""
        from ba_lora.models.classifier import head_names

        first = head_names(model)[0]
        if first == "score":
            raise UserError(f"adapter.tuner=nmtune is for encoders, and {model.config.model_type} is a decoder")
        self._width = model.config.hidden_size
        return [first]

    def peft_config(self, num_steps: int) -> Any:
        return peft_settings(NMTuneConfig, self, width=self._width, expansion=self.option["expansion"])

    def check_reference(self) -> None:
        raise UserError("NMTune has BA-LoRA's terms itself: set regularizers.lambda_consistency=0")

    def terms(self, model: nn.Module) -> list[WeightTerm]:
        def term(name: str, function: Any) -> WeightTerm:
            return WeightTerm(name, self.option["weight"], lambda model: function(*features(model)))

        return [
            term("nmtune_consistency", feature_consistency),
            term("nmtune_covariance", feature_covariance),
            term("nmtune_dominance", feature_dominance),
        ]


def features(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return F and Z of the last pass, [M, D]."""
    layer = next(module for module in model.modules() if isinstance(module, NMTuneLayer))
    assert DEFAULT in layer.nmtune_mlp and layer.features is not None
    return layer.features


def feature_consistency(pretrained_MD: Tensor, mapped_MD: Tensor) -> Tensor:
    """Return the mean over rows of ‖F/‖F‖ − Z/‖Z‖‖², a scalar."""
    unit = nn.functional.normalize
    return (unit(pretrained_MD, dim=1) - unit(mapped_MD, dim=1)).square().sum(1).mean()


def feature_covariance(pretrained_MD: Tensor, mapped_MD: Tensor) -> Tensor:
    """Return Σ_{i≠j} C_ij² / D, 0 for a single row."""
    if len(mapped_MD) < 2:
        return mapped_MD.sum() * 0
    covariance = torch.cov(mapped_MD.T)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / mapped_MD.shape[1]


def feature_dominance(pretrained_MD: Tensor, mapped_MD: Tensor) -> Tensor:
    """Return −σ₁ / Σ σ."""
    values = torch.linalg.svdvals(mapped_MD.float())
    return -values[0] / values.sum()


TUNER = NMTune
