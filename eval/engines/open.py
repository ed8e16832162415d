"""Text generation: vLLM (vllm.py) and transformers (hf.py) behind one call.

    with open_engine("auto", "outputs/RUN/merged") as engine:
        completions = engine.generate(["What is 2 + 3?"], max_new_tokens=64)      # list (prompts) of lists (samples)

Both engines get the same token ids (`encode_prompts`), stop at the same tokens and strings, and their ids become text
by the same function (`cut_completion`), so that greedy completions differ only where the arithmetic does. The sampling
defaults that many models carry in generation_config.json (a temperature, a repetition penalty) are not used: what is
not asked for here does not happen. A prompt that fills the context gives an empty completion with finish_reason
"prompt_too_long"; where less room is left than asked for, max_new_tokens is clamped and the completion says so.

vLLM starts worker processes: call it under `if __name__ == "__main__"`.
"""

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ba_lora.errors import UserError
from eval.engines.adapters import check_adapter, read_adapter
from eval.engines.base import Engine, EngineOptions, load_base_config, resolve_dtype

KINDS = ("auto", "vllm", "hf")


def choose_engine(kind: str, base: str, options: EngineOptions = EngineOptions()) -> str:
    """Return "vllm" or "hf" for a base. `auto` is vLLM where it is installed and a CUDA device is there, else
    transformers, as for all models on a base in float32: on a GPU vLLM serves adapters in 16 bits only, and models that
    are compared are to have one engine.

    Raises UserError where `check_engine` does, and for a base that is not there.
    """
    check_engine(kind)
    if kind != "auto":
        return kind
    import torch

    if not _has_vllm() or not torch.cuda.is_available():
        return "hf"
    return "hf" if resolve_dtype(options.dtype, load_base_config(base, options)) == "float32" else "vllm"


def check_engine(kind: str) -> None:
    """Raise UserError for an unknown kind and for an engine that is not installed, without the seconds of torch."""
    if kind not in KINDS:
        raise UserError(f"unknown engine {kind!r}: choose one of {', '.join(KINDS)}")
    if kind == "vllm" and not _has_vllm():
        raise UserError("vLLM is not installed: run `sh scripts/setup.sh` without BA_LORA_NO_VLLM, or use --engine hf")


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


@contextlib.contextmanager
def open_engine(
    kind: str,
    base: str | Path,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    options: EngineOptions = EngineOptions(),
) -> Iterator[Engine]:
    """Load `base` (a folder or a hub id) and `adapters` (name → PEFT adapter folder) once, and close them at the end.

    Raises UserError for a missing model or engine, and for an adapter that does not belong on this base.
    """
    chosen = choose_engine(kind, str(base), options)
    folders = {name: str(Path(path).resolve()) for name, path in (adapters or {}).items()}
    for folder in folders.values():
        read_adapter(folder)
        check_adapter(folder, str(base), options)
    started = time.monotonic()
    if chosen == "vllm":
        from eval.engines.vllm import VLLMEngine as Chosen
    else:
        from eval.engines.hf import HFEngine as Chosen
    engine = Chosen(str(base), folders, options)
    engine.startup_seconds = time.monotonic() - started
    try:
        yield engine
    finally:
        engine.close()
