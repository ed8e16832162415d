"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): ΔW = s P Λ Q, Λ diagonal; singular values are pruned by importance.

PEFT has the layers and the allocation; it leaves to the training loop: pruning after each step, the orthogonality term,
the importances in checkpoints, and the ranks of what is saved.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.methods.base import DEFAULT, Tuner, WeightTerm, peft_settings, whole_alpha

IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator: parameter → tensor


class AdaLora(Tuner):
    """Ranks start at 1.5 × `rank` and are pruned to it between 10 % and 70 % of the steps, unless options say more."""

    peft_options = {
        "tinit": (0, "[0, 1000000000]"),
        "tfinal": (0, "[0, 1000000000]"),
        "deltaT": (1, "[1, 1000000000]"),
        "beta1": (0.85, "(0, 1)"),
        "beta2": (0.85, "(0, 1)"),
        "orth_reg_weight": (0.5, "[0, 1000000]"),
    }
    term_names = ("orthogonality",)
    no_deepspeed = "AdaLoRA ranks directions by gradients that DeepSpeed hides: use DDP or one process"

    @staticmethod
    def recognises(peft_config: Any) -> bool:
        return peft_config.peft_type == "ADALORA"

    @property
    def first_rank(self) -> int:
        return self.adapter.rank * 3 // 2

    def peft_config(self, num_steps: int) -> Any:
        from peft import AdaLoraConfig

        adapter = self.adapter
        if num_steps < 10:
            raise UserError(
                f"adapter.tuner=adalora prunes over the steps and needs at least 10, this run has {num_steps}"
            )
        return peft_settings(
            AdaLoraConfig,
            self,
            init_r=self.first_rank,
            target_r=adapter.rank,
            lora_alpha=whole_alpha(adapter),
            lora_dropout=adapter.dropout,
            total_step=num_steps,
            tinit=num_steps // 10,
            tfinal=num_steps * 3 // 10,
            deltaT=max(1, num_steps // 100),
        )

    def prepare(self, model: nn.Module) -> None:
        """Keep the optimizer from training `ranknum`, a divisor in the forward pass.

        PEFT freezes it, then casts it to a half-precision base's dtype, which makes a new, trainable parameter, and
        leaves it out of what it saves.
        """
        for name, parameter in model.named_parameters():
            if ".ranknum." in name:
                parameter.requires_grad_(False)

    def terms(self, model: nn.Module) -> list[WeightTerm]:
        return [WeightTerm("orthogonality", model.peft_config[DEFAULT].orth_reg_weight, adalora_orthogonality)]

    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Prune, while the gradients that rank the directions are still there.

        Those of a step that half precision's loss scaler left out are not finite, and would stay in the importances.
        """
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        model.base_model.update_and_allocate(step)

    @contextlib.contextmanager
    def checkpointing(self, model: nn.Module) -> Iterator[None]:
        """Save the factors whole: cut to the ranks of the last allocation, they would not fit the resumed model."""
        config = model.peft_config[DEFAULT]
        ranks, config.rank_pattern = config.rank_pattern, None
        try:
            yield
        finally:
            config.rank_pattern = ranks

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        allocator, ranks = model.base_model.rankallocator, model.peft_config[DEFAULT].rank_pattern or {}
        found = {f"{kind}:{name}": value for kind in IMPORTANCES for name, value in getattr(allocator, kind).items()}
        return found | {f"kept:{name}": torch.tensor(kept) for name, kept in ranks.items()}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        device, ranks = next(model.parameters()).device, {}
        for key, value in state.items():
            kind, _, name = key.partition(":")
            if kind == "kept":
                ranks[name] = value.tolist()
            else:
                getattr(model.base_model.rankallocator, kind)[name] = value.to(device)
        model.peft_config[DEFAULT].rank_pattern = ranks or None

    def before_save(self, model: nn.Module) -> None:
        """Let PEFT cut an adapter that it saves by the weights it has now.

        PEFT drops what the last allocation pruned. That is another model where the weights are those of an earlier
        epoch, and between two allocations, when pruned directions move again. A direction whose singular value is 0
        adds nothing: to drop these only, all of them, leaves the model as it is.
        """
        model.peft_config[DEFAULT].rank_pattern = {
            name: (values != 0).flatten().tolist()
            for name, values in model.base_model.model.named_parameters()
            if "lora_E.default" in name
        }


def adalora_orthogonality(model: nn.Module) -> Tensor:
    """Return the mean over all factors of ‖Pᵀ P − I‖_F and ‖Q Qᵀ − I‖_F, a scalar; P [out, r], Q [r, in].

    As PEFT has it: arXiv 2303.10512, eq. 4, takes the sum of the squared norms. PEFT adds the term only to a loss that
    the model computes itself, and once per micro-batch unscaled; so the training loop calls this.
    """
    norms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            norms.append(torch.linalg.norm(gram - torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype)))
    return torch.stack(norms).mean()


TUNER = AdaLora
