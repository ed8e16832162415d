"""What a trained run leaves to the world: adapter, plain LoRA, merged model; each compared with the trained model.

    adapter/   the trained PEFT adapter as it is. That of PiSSA and kin belongs to the residual base W − B₀A₀, and some
               methods need more than PEFT's weights, so:
    lora/      of these: a plain LoRA on the untouched base (plain_lora.py; of PiSSA and kin its rank is 2r), in
               float32; any PEFT or vLLM loads it without knowing where it comes from
    ranks/<b>  of a method for every rank (DyLoRA): a plain LoRA of rank b, compared with the trained model at that rank
    merged/    an ordinary model folder, W + BA − B₀A₀, in the base's dtype

Each is written beside its final place and renamed, so a killed export leaves nothing half-written, and each is loaded
again and its logits compared with the trained model's. In float32 they are equal but for rounding. A half-precision
base costs a share of what was learned, which is measured, reported, and refused above `MAX_SHARE`: training rounded the
residual W − B₀A₀ to the base's dtype, lora/ stands on W itself, and merged/ rounds W + BA − B₀A₀.

On a quantised base merged/ is the model that was trained, its 4-bit weights written out in the base's dtype plus BA.
lora/ or adapter/ belongs on the unquantised base, which is another model: its distance is reported and not judged.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from ba_lora.config.methods import adapter_loads, init_facts, writes_lora
from ba_lora.config.schema import RunConfig, public
from ba_lora.errors import UserError
from ba_lora.io import disk_errors, folder_atomic, load_tensors
from ba_lora.methods.base import DEFAULT, METHOD_STATE, TrainingMethod
from ba_lora.methods.build import probe_logits
from ba_lora.methods.pissa import factors_path
from ba_lora.models.pretrained import load_base, load_dequantized
from ba_lora.models.source import model_source
from ba_lora.models.tokenizer import load_tokenizer
from ba_lora.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ba_lora.runs.parity import Parity, compare_logits

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ba_lora.training.trainer import BALoRATrainer


ADAPTER_FILES = ADAPTER_WEIGHTS, ADAPTER_CONFIG


def adapter_files(config: RunConfig) -> tuple[str, str]:
    """Return the names of the weights and settings in adapter/.

    PEFT rebuilds the residual of an exact PiSSA adapter when it loads it. It cannot rebuild others and would be wrong
    without an error: those are kept under names that it does not load.
    """
    if adapter_loads(config.adapter):
        return ADAPTER_FILES
    return "trained.safetensors", "trained_config.json"


def serving_adapter(run_path: Path) -> Path:
    """Return the adapter folder that works on the untouched base: lora/ where there is one, else adapter/."""
    lora = run_path / "lora"
    return lora if lora.is_dir() else run_path / "adapter"


def save_trained(trainer: "BALoRATrainer", config: RunConfig, run_path: Path) -> None:
    """Write the trained weights: adapter/ for adapters, merged/ for full fine-tuning. Every process calls it."""
    target = run_path / ("merged" if config.adapter.trains_own_weights else "adapter")
    temporary = target.with_name(f".{target.name}.saving")
    main = trainer.accelerator.is_main_process
    trainer.model.config.use_cache = True  # what was off for training; generation wants it
    trainer.method.tuner.before_save(trainer.plain_model())
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        with disk_errors(target):
            trainer.save_model(str(temporary))
        trainer.accelerator.wait_for_everyone()
        if main:
            with folder_atomic(target) as folder:
                for file in temporary.iterdir():
                    if file.name not in ("training_args.bin", "README.md"):  # no pickles; our own card comes later
                        shutil.move(file, folder / file.name)
                if not config.adapter.trains_own_weights:
                    _fix_adapter_files(folder, config)
                state = trainer.method.tuner.saved_state(trainer.plain_model())
                if state and writes_lora(config.adapter):  # which needs it
                    save_file(state, folder / METHOD_STATE)
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)


def export_run(
    config: RunConfig,
    run_path: Path,
    probe: dict,
    trained_logits: "torch.Tensor",
    *,
    initial_logits: "torch.Tensor | None" = None,
) -> dict[str, Parity]:
    """Write lora/ and merged/ from adapter/, compare each with the trained model; return name → `Parity`.

    `initial_logits` are the trained model's at step 0. Raises UserError where an export is too far off (parity.py);
    the folder in question is kept as <name>.rejected.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if not trained_logits.isfinite().all():
        raise UserError(
            "the trained model's logits are not finite: training has diverged; lower trainer.learning_rate, "
            "adapter.alpha or the regularizers' λ"
        )
    unset_hf_deepspeed_config()  # or ZeRO-3 would split the models loaded here, for this process only

    def compare(name: str, model: "nn.Module", trained: "torch.Tensor" = trained_logits) -> Parity:
        return compare_logits(name, probe_logits(model, probe), trained, initial_logits, config, run_path)

    if config.adapter.trains_own_weights:
        return {"merged": compare("merged", _load_merged(config, run_path / "merged"))}
    if writes_lora(config.adapter):
        convert_to_lora(run_path / "adapter", factors_path(run_path), run_path / "lora", config=config)
    for rank in config.export.ranks:
        write_rank(run_path / "adapter", run_path / "ranks" / str(rank), rank, config=config)
    name = serving_adapter(run_path).name
    model = _on_device(_with_adapter(config, serving_adapter(run_path)))
    parities = {name: compare(name, model)}
    tuner = TrainingMethod.of(config.adapter, seed=config.seed).tuner
    for rank in config.export.ranks:  # with the trained adapter, which `model` now is, at that rank
        with tuner.at_rank(model, rank):
            trained_there = probe_logits(model, probe)
        of_rank = _on_device(_with_adapter(config, run_path / "ranks" / str(rank)))
        parities[f"ranks/{rank}"] = compare(f"ranks/{rank}", of_rank, trained_there)
    if config.export.merged:
        if config.model.quantization != "none":
            model = _trained_dequantized(config, run_path)
        merge(model, run_path / "merged", config=config)
        del model
        parities["merged"] = compare("merged", _load_merged(config, run_path / "merged"))
    return parities


def convert_to_lora(adapter_path: Path, initial_factors: Path, output_path: Path, *, config: RunConfig) -> None:
    """Write the plain LoRA equal to a trained adapter, with its tokenizer.

    What the method adds (`to_plain_lora`) comes first, then the residual of its init is taken back.
    """
    from ba_lora.training.plain_lora import write_plain_lora

    weights_name, settings_name = adapter_files(config)
    settings = json.loads((adapter_path / settings_name).read_text())
    state = load_tensors(adapter_path / METHOD_STATE) if (adapter_path / METHOD_STATE).is_file() else {}
    weights = load_tensors(adapter_path / weights_name)
    weights, settings = TrainingMethod.of(config.adapter, seed=config.seed).tuner.to_plain_lora(
        weights, settings, state
    )
    initial = load_tensors(initial_factors) if init_facts(config.adapter).get("residual") else {}
    with folder_atomic(output_path) as folder:
        write_plain_lora(folder, weights, initial, settings)
        _run_tokenizer(config).save_pretrained(folder)


def write_rank(adapter_path: Path, output_path: Path, rank: int, *, config: RunConfig) -> None:
    """Write the first `rank` rows of A and columns of B as a plain LoRA of that rank, with the same α."""
    settings = json.loads((adapter_path / ADAPTER_CONFIG).read_text()) | {"r": rank}
    weights = {
        name: value[:rank] if ".lora_A." in name else value[:, :rank] if ".lora_B." in name else value
        for name, value in load_tensors(adapter_path / ADAPTER_WEIGHTS).items()
    }
    with folder_atomic(output_path) as folder:
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        _run_tokenizer(config).save_pretrained(folder)


def _run_tokenizer(config: RunConfig) -> "PreTrainedTokenizerBase":
    return load_tokenizer(
        config.model, **({"template": config.data.template} if config.kind == "nlg" else {"generates": False})
    )


def export_lora(trainer: "BALoRATrainer", folder: str | Path) -> Path:
    """Write the trained adapter as a plain LoRA that any PEFT or vLLM loads on the untouched base; return the folder.

    Of PiSSA and kin that is a LoRA of twice the rank, else the adapter itself, or what its method makes of it. Every
    process calls it. Raises UserError for an adapter that is no LoRA.
    """
    from ba_lora.training.plain_lora import write_plain_lora

    folder = Path(folder)
    model = trainer.plain_model()
    if not hasattr(model, "peft_config"):
        raise UserError("export_lora needs a model with an adapter: save_model writes a model without one")
    tuner, kind = trainer.method.tuner, model.peft_config[DEFAULT].peft_type
    if tuner.plain_lora != "lora" and kind != "LORA":
        raise UserError(
            f"export_lora: no plain LoRA equals an adapter of type {getattr(kind, 'value', kind)}: write it by "
            "save_model, or merge it (merge_and_unload)"
        )
    tuner.before_save(model)
    temporary = folder.with_name(f".{folder.name}.saving")
    main = trainer.accelerator.is_main_process
    try:
        with disk_errors(folder):
            trainer.save_model(str(temporary))
        trainer.accelerator.wait_for_everyone()
        if main:
            with folder_atomic(folder) as target:
                weights = load_tensors(temporary / ADAPTER_WEIGHTS)
                settings = json.loads((temporary / ADAPTER_CONFIG).read_text())
                weights, settings = tuner.to_plain_lora(weights, settings, tuner.state(model))
                write_plain_lora(target, weights, trainer.initial_factors, settings)
                for file in temporary.iterdir():  # no pickles, and no card that knows nothing of the training
                    if not (target / file.name).exists() and file.name not in ("training_args.bin", "README.md"):
                        shutil.move(file, target / file.name)
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return folder


def merge(model: "nn.Module", output_path: Path, *, config: RunConfig) -> None:
    """Merge the adapter of a PEFT model into its base and write an ordinary model folder with its tokenizer."""
    merged = model.merge_and_unload(safe_merge=True)
    TrainingMethod.of(config.adapter, seed=config.seed).tuner.finish_merge(merged)
    merged.config.use_cache = True
    with folder_atomic(output_path) as folder:
        merged.save_pretrained(folder)
        _run_tokenizer(config).save_pretrained(folder)


def push_to_hub(run_path: Path, config: RunConfig) -> str:
    """Upload the adapter that serves on the untouched base, and merged/ as a sub-folder; return the address."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        url = api.create_repo(config.hub.repo_id, private=config.hub.private, exist_ok=True)
        if not config.adapter.trains_own_weights:
            folder, name = serving_adapter(run_path), ADAPTER_CONFIG
            settings = json.loads((folder / name).read_text())  # names a local base by this machine's folders
            settings["base_model_name_or_path"] = public(settings["base_model_name_or_path"])
            told = (json.dumps(settings, indent=2) + "\n").encode()
            api.upload_folder(repo_id=config.hub.repo_id, folder_path=folder, ignore_patterns=[name])
            api.upload_file(repo_id=config.hub.repo_id, path_or_fileobj=told, path_in_repo=name)
        if (run_path / "merged").is_dir():
            where = "." if config.adapter.trains_own_weights else "merged"
            api.upload_folder(repo_id=config.hub.repo_id, folder_path=run_path / "merged", path_in_repo=where)
    except (HTTPError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(
            f"cannot push to {config.hub.repo_id}: {str(error).splitlines()[0]}; run `hf auth login` and check "
            "hub.repo_id, then run the same command again (nothing is trained twice)"
        ) from error
    return str(url)


def _fix_adapter_files(folder: Path, config: RunConfig) -> None:
    """Name the untouched base in the settings, and give both files the names of `adapter_files`."""
    path = folder / ADAPTER_CONFIG
    settings = json.loads(path.read_text())
    base = model_source(config.model)  # a relative path would be found from this folder only
    settings["base_model_name_or_path"] = str(Path(base).resolve()) if Path(base).is_dir() else base
    settings["revision"] = config.model.revision
    path.write_text(json.dumps(settings, indent=2) + "\n")
    weights_name, settings_name = adapter_files(config)
    path.rename(folder / settings_name)
    (folder / ADAPTER_WEIGHTS).rename(folder / weights_name)


def _with_adapter(config: RunConfig, adapter_path: Path) -> "nn.Module":
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(config, quantize=False), adapter_path).eval()


def _trained_dequantized(config: RunConfig, run_path: Path) -> "nn.Module":
    """Return the trained model with its 4-bit weights written out in the base's dtype."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    residual = init_facts(config.adapter).get("residual")
    source = str(run_path / "residual") if residual else None
    folder = run_path / "adapter" if residual else serving_adapter(run_path)
    weights_name, settings_name = adapter_files(config) if residual else ADAPTER_FILES
    settings = json.loads((folder / settings_name).read_text())
    plain = {"init_lora_weights": True, "loftq_config": {}, "inference_mode": False, "base_model_name_or_path": None}
    settings = LoraConfig.from_peft_type(**settings | plain)
    model = get_peft_model(load_dequantized(config, source=source), settings)
    set_peft_model_state_dict(model, load_tensors(folder / weights_name))
    return model.eval()


def _load_merged(config: RunConfig, path: Path) -> "nn.Module":
    return _on_device(load_base(config, source=str(path), quantize=False))


def _on_device(model: "nn.Module") -> "nn.Module":
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model
