"""The tiny Llama of the embedded default and its training from scratch: for data/toy/pretrain.py and data/lab.py.
data/lab_nlu.py trains a classifier by the same loop."""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedModel

VOCAB_SIZE = 576
ARCHITECTURE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,  # the smallest that vLLM's CPU attention takes
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,  # as the Llamas of the paper: the head is a matrix of its own
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.05,
}
OPTIMIZER = {"learning_rate": 3e-3, "betas": (0.9, 0.98), "weight_decay": 0.05, "warmup": 0.03, "clip": 1.0}


def untrained_llama(seed: int, **changes: Any) -> "LlamaForCausalLM":
    """Return a randomly initialised Llama of `ARCHITECTURE`, with these changes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**ARCHITECTURE | changes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.architectures = ["LlamaForCausalLM"]
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    return LlamaForCausalLM(config)


def train(
    model: "PreTrainedModel",
    batch: Callable[[int], "Tensor | Mapping[str, Tensor]"],
    *,
    num_steps: int,
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train by AdamW, warm-up and cosine, where the model is; batch: step → token ids [B, T], which are the labels too,
    or all that the model takes; settings: the keys of `OPTIMIZER`.

    Returns the loss curve (nats a token or row, means of 50 steps) and the seconds by wall clock and by CPU.
    """
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings["learning_rate"],
        betas=settings["betas"],
    )
    warmup = max(1, round(settings["warmup"] * num_steps))

    def scale(step: int) -> float:  # linear warm-up, then cosine to 2 %
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    curve, recent, start, cpu_start = [], [], time.perf_counter(), time.process_time()
    model.train()
    for step in range(num_steps):
        inputs = batch(step)
        if isinstance(inputs, torch.Tensor):
            inputs = {"input_ids": inputs, "labels": inputs}
        loss = model(**{name: value.to(model.device) for name, value in inputs.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == num_steps:
            seconds = time.perf_counter() - start
            point = {"step": step + 1, "loss": round(sum(recent) / len(recent), 4)}
            curve.append({**point, "seconds": round(seconds, 1)})
            recent = []
            say(f"step {step + 1}/{num_steps}  loss {point['loss']:.4f}  {seconds:.0f} s")
    model.eval()
    return {
        "loss_curve": curve,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),  # what it takes on an idle machine
    }
