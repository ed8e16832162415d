"""MonteCLoRA (Sengupta et al. 2024, arXiv 2411.04358): in training A is drawn around its mean, with learned spread.

    A + Σ_n π_n E_n,   E_n = ε Z √v,   v = exp 2σ ⊙ diag Wishart(r, I),   π = softmax of a logistic normal of exp a

σ [r] and a [N] are trained beside A and B under a KL term with three parts; in evaluation it is a plain LoRA, and so is
its export. By PEFT, of which three things are set right: its KL of the Dirichlet distributions (as the official code's)
has the sign of ln Γ reversed and overflows from N of about 20; its buffer of 150 draws a layer is 700 GB for LLaMA-2-7B
at r = 128; and with a buffer a recomputed pass (gradient checkpointing) takes another draw than the first one. Here
each pass draws from the random state, which checkpointing, and a resumed run, restore.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ba_lora.methods.base import DEFAULT, WeightTerm
from ba_lora.methods.lora import Lora


class MonteCLora(Lora):
    """LoRA and (r + N) parameters more a layer."""

    options = {
        "num_samples": (4, "[1, 1024]"),
        "sample_scaler": (5e-3, "(0, 1000]"),
        "dirichlet_prior": (1.0, "(0, 1000000]"),
        "kl_loss_weight": (1e-5, "[0, 1000000]"),
        "use_entropy": (True, (True, False)),
    }
    takes_dora = False
    takes_half = False  # PEFT's draw of the weights π is in float32 and multiplies it with the adapter's
    quantizes = False
    limits = "draws in PEFT's plain layers, which a quantised base does not have"
    plain_lora = "lora"
    term_names = ("variational_kl", "expert_concentration")
    draws_in_training = "noise of each pass"

    @staticmethod
    def recognises(peft_config: Any) -> bool:
        return getattr(peft_config, "monteclora_config", None) is not None

    def peft_config(self, num_steps: int) -> Any:
        from peft.tuners.lora.config import MontecloraConfig

        return super().peft_config(num_steps, monteclora_config=MontecloraConfig(**self.option, buffer_size=1))

    def prepare(self, model: nn.Module) -> None:
        """Let each pass draw again."""
        for sampler in samplers(model):
            sampler.sampler.index = sampler.sampler.buffer_size

    def terms(self, model: nn.Module) -> list[WeightTerm]:
        """The means over layers of the KL and, with use_entropy, of Σ π²."""
        config = model.peft_config[DEFAULT].monteclora_config
        found = [WeightTerm("variational_kl", config.kl_loss_weight, mean_kl)]
        if config.use_entropy:
            found.append(WeightTerm("expert_concentration", 1.0, mean_concentration))
        return found

    def to_plain_lora(
        self, weights: dict[str, Tensor], settings: dict[str, Any], state: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        kept = {name: value for name, value in weights.items() if "lora_monteclora_sampler" not in name}
        return kept, settings | {"monteclora_config": None}


def samplers(model: nn.Module) -> list[nn.Module]:
    """Return the trained adapter's sampler of each layer."""
    found = (getattr(module, "lora_monteclora_sampler", {}) for module in model.modules())
    return [entries[DEFAULT] for entries in found if DEFAULT in entries]


def dirichlet_kl(posterior: Tensor, prior: Tensor) -> Tensor:
    """Return KL(Dir(posterior) ‖ Dir(prior)), both [N]; it is 0 or more."""
    total = posterior.sum()
    return (
        torch.lgamma(total)
        - torch.lgamma(prior.sum())
        + (torch.lgamma(prior) - torch.lgamma(posterior)).sum()
        + ((posterior - prior) * (torch.digamma(posterior) - torch.digamma(total))).sum()
    )


def wishart_kl(variances: Tensor) -> Tensor:
    """Return r/2 (tr V − ln|V| − r) of the diagonal V [r]."""
    return 0.5 * len(variances) * (variances.sum() - variances.log().sum() - len(variances))


def gaussian_kl(variances: Tensor, num_samples: int) -> Tensor:
    """Return N/2 (tr v − Σ ln v − r) of the drawn v [r]."""
    return 0.5 * num_samples * (variances.sum() - variances.log().sum() - len(variances))


def mean_kl(model: nn.Module) -> Tensor:
    """Return the mean over layers of the three, at the draws of the last pass."""
    values = []
    for sampler in samplers(model):
        posterior = sampler.expert_weights_prior.float().exp()
        drawn = sampler.gaussian_var_prior.float().diagonal().clamp(min=1e-6)
        values.append(
            dirichlet_kl(posterior, torch.full_like(posterior, sampler.dirichlet_prior))
            + wishart_kl((2 * sampler.std_prior.float()).exp())
            + gaussian_kl(drawn, sampler.num_samples)
        )
    return torch.stack(values).mean()


def mean_concentration(model: nn.Module) -> Tensor:
    """Return the mean over layers of Σ π², 1/N where all samples count the same."""
    return torch.stack([sampler.expert_weights.float().square().sum() for sampler in samplers(model)]).mean()


TUNER = MonteCLora
