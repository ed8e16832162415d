"""Train a tiny classifier for 6 steps under python or torchrun and save log, weights and predictions.

train_tiny_nlu.py REGULARIZERS ACCUMULATION OUT [CACHE]       CACHE: the folder of the cached reference
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.errors import end_process
from ba_lora.models.predict import predict
from ba_lora.objective.reference_cache.features import CachedFeatures
from tests.support.tiny import adapter_weights, arguments
from tests.support.tiny_nlu import classifier_trainer, save_tiny_encoder, tiny_classifier, tiny_pairs

regularizers, accumulation, output = NLURegularizersConfig(**json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
folder = save_tiny_encoder(Path(tempfile.mkdtemp()), dropout=0.0)  # which would draw other numbers
rows = tiny_pairs(folder, 24)  # whole effective batches: accelerate would fill a short one with rows of its own
model = tiny_classifier(folder)
trainer = classifier_trainer(
    model,
    arguments(
        Path(tempfile.mkdtemp()),
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        warmup_steps=0,
    ),
    regularizers=regularizers,
    cache=CachedFeatures(Path(sys.argv[4]), {"encoder": "tiny"}) if len(sys.argv) > 4 else None,
    train_dataset=rows,
    data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(folder)),
)
trainer.train()
predictions = predict(trainer.model_wrapped, rows, trainer.data_collator, batch_size=24)  # none for a second process
if trainer.is_world_process_zero():
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    torch.save(
        {
            "processes": trainer.accelerator.num_processes,
            "logs": {name: [entry[name] for entry in history] for name in history[0]},
            "weights": adapter_weights(model),
            "logits": predictions.logits,
        },
        output,
    )
end_process()
