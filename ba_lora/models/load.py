"""The pre-trained model, loaded from a folder or the hub, safetensors only."""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ba_lora.config.schema import ModelConfig
from ba_lora.errors import UserError
from ba_lora.models.source import hub_errors, model_source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(config: ModelConfig, *, source: str | None = None, quantize: bool = True) -> "PreTrainedModel":
    """Return the causal language model in `config.dtype`, from `source` where given (a residual base, say).

    Raises UserError for an absent or gated model, an unknown architecture, or an option this machine cannot run.
    """
    from transformers import AutoModelForCausalLM

    check_hardware(config)
    options = {"code_revision": config.revision} if config.trust_remote_code else {}
    if quantize:
        options |= quantization_options(config)
    with hub_errors(config.name, "model"), without_load_report():
        model, report = AutoModelForCausalLM.from_pretrained(
            source or model_source(config),
            revision=None if source else config.revision,
            dtype=torch_dtype(config.dtype),
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `require_weights` names them
            **options,
        )
    require_weights(report, source or config.name)
    keep_4bit_layout(model)
    model.config.use_cache = False  # a training model keeps no keys and values; generation loads its own
    return model


def require_weights(report: Mapping[str, Any], name: str) -> None:
    """Raise UserError where from_pretrained's loading info tells of weights that the files lack or have in another
    shape: transformers makes those up at random."""
    missing = sorted(report["missing_keys"])
    missing += sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    if missing:
        found = sorted(report["unexpected_keys"])
        other = f"; it has others, such as {found[0]}" if found else ""
        raise UserError(f"{name} lacks {len(missing)} weights of its model, such as {missing[0]}{other}: save it again")


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Keep transformers from its table of missing weights: a new head's are missing rightly, others are an error."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def quantization_options(config: ModelConfig, *, skip: list[str] | None = None) -> dict:
    """Return from_pretrained's argument for `config.quantization`; the modules named in `skip` stay as they are."""
    if config.quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch_dtype(config.dtype),
        llm_int8_skip_modules=skip,
    )
    return {"quantization_config": settings}


def keep_4bit_layout(model: "torch.nn.Module") -> None:
    """Keep bitsandbytes from packing 4-bit weights anew, in bfloat16, when a model is first asked on a CPU with
    AVX512-BF16: it then computes otherwise than in training, and fails where a weight's width is no multiple of 64."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def torch_dtype(name: str) -> "torch.dtype":
    """Return the torch dtype called `name`."""
    import torch

    return getattr(torch, name)


def check_hardware(config: ModelConfig) -> None:
    """Raise UserError where the configuration asks for a GPU, or a package, that is not there."""
    if config.quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantization=nf4 needs bitsandbytes: pip install -r requirements.txt")
    if config.attention == "flash_attention_2" and (lack := flash_attention_lacks(config.dtype)):
        raise UserError(f"model.attention=flash_attention_2 needs {lack}")


def flash_attention_lacks(dtype: str) -> str | None:
    """Return what flash_attention_2 would need here for weights of `dtype`, in words, or None where it can run."""
    import torch

    if not torch.cuda.is_available():
        return "a CUDA GPU, and none was found: use sdpa"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn: pip install flash-attn, or use sdpa"
    if dtype == "float32":
        return "model.dtype bfloat16 or float16, not float32"
    return None
