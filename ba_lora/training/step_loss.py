"""StepLoss: how a micro-batch's terms become their share of an optimizer step, in trainers over transformers'."""

from typing import Any

from torch import Tensor

from ba_lora.objective.losses.plain import TermSums
from ba_lora.objective.objective import Objective
from ba_lora.training.log import TermMeter


class StepLoss:
    """What BALoRATrainer and the mixin BALoRALoss share; the Trainer beneath has args, accelerator and state."""

    args: Any
    accelerator: Any
    current_gradient_accumulation_steps: int

    def _minimise(self, objective: Objective) -> None:
        """Make Trainer count the positions (or rows) of the effective batch as the objective does."""
        self.objective = objective
        objective.attach(self.accelerator)
        self.model_accepts_loss_kwargs = True  # Trainer counts only then
        self._loss_shifts_labels = objective.shifts_labels
        self._term_meter = TermMeter([term.name for term in objective.terms])

    def _factors(self, lambdas: dict[str, float], number: Tensor | int, *, training: bool) -> dict[str, float | Tensor]:
        """Return what each term of the micro-batch is multiplied with. DDP and DeepSpeed average gradients over the
        processes, hence their number in the factors of means."""
        shared = training and self.args.average_tokens_across_devices
        mean = (self.accelerator.num_processes if shared else 1) / number
        micro_batch = 1 / (self.current_gradient_accumulation_steps if training else 1)
        return self.objective.factors(lambdas, of_position=mean, of_micro_batch=micro_batch)

    def _record(self, sums: dict[str, TermSums], lambdas: dict[str, float], number: Tensor | int) -> None:
        """Give the micro-batch's share of each term's value to the log (on the device, no synchronisation)."""
        micro_batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        values = self.objective.step_values(sums, lambdas, number=number, micro_batches=micro_batches)
        self._term_meter.add(values, steps=1 / self.current_gradient_accumulation_steps)

    def _summed(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, which all call it."""
        return self.accelerator.reduce(tensor, reduction="sum")
