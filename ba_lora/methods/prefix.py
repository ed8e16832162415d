"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190): trained keys and values stand before each layer's own; by PEFT."""

from ba_lora.methods.prompt import PromptTuning


class PrefixTuning(PromptTuning):
    """tokens · 2 · L · key size parameters; without the paper's MLP, which only helps training (PEFT's
    prefix_projection)."""

    config_class = "PrefixTuningConfig"


TUNER = PrefixTuning
