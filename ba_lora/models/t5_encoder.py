"""T5's encoder with a classification head, which transformers lacks: mean over the tokens, then one linear layer.

transformers' own T5ForSequenceClassification runs the decoder, too. Importing this file makes the Auto classes know the
model type `t5_encoder`, as which such a model is saved.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, T5Config, T5TokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.t5.modeling_t5 import T5EncoderModel


class T5EncoderConfig(T5Config):
    """T5's configuration under a model type of its own."""

    model_type = "t5_encoder"


class T5EncoderForSequenceClassification(T5EncoderModel):
    """logits = classifier(dropout(mean over the real tokens of the encoder's last hidden states))."""

    config_class = T5EncoderConfig
    base_model_prefix = "encoder"

    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "classifier", None):
            nn.init.normal_(module.weight, std=self.config.initializer_factor * self.config.d_model**-0.5)
            nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """input_ids, attention_mask [N, T] → logits [N, num_labels]."""
        outputs = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        hidden_NTD = outputs.last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(hidden_NTD.shape[:2], device=hidden_NTD.device)
        mask_NT1 = attention_mask.to(hidden_NTD.dtype)[..., None]
        mean_ND = (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(self.dropout(mean_ND)))


AutoConfig.register("t5_encoder", T5EncoderConfig, exist_ok=True)
AutoModelForSequenceClassification.register(T5EncoderConfig, T5EncoderForSequenceClassification, exist_ok=True)
AutoTokenizer.register(T5EncoderConfig, fast_tokenizer_class=T5TokenizerFast, exist_ok=True)
