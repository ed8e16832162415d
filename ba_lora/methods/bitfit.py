"""BitFit (arXiv 2106.10199): every bias of the pre-trained part is trained, and a classifier's new head."""

from typing import TYPE_CHECKING

from ba_lora.errors import UserError
from ba_lora.methods.full import OwnWeights

if TYPE_CHECKING:
    from torch import nn


class BitFit(OwnWeights):
    """The biases, and a classifier's new head."""

    def choose(self, model: "nn.Module") -> None:
        """Raises UserError for a model without biases."""
        from ba_lora.models.classifier import backbone, head_names

        model.requires_grad_(False)
        biases = [p for name, p in backbone(model).named_parameters() if name.rsplit(".", 1)[-1] == "bias"]
        if not biases:
            raise UserError(f"method bitfit trains biases, and this {model.config.model_type} model has none")
        for parameter in [*biases, *(p for name in head_names(model) for p in getattr(model, name).parameters())]:
            parameter.requires_grad_(True)


TUNER = BitFit
