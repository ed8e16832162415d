"""What a trained run leaves to the world: adapter, plain LoRA, merged model; each compared with the trained model.

    adapter/   the trained PEFT adapter as it is. That of PiSSA or CorDA belongs to the residual base W − B₀A₀, so:
    lora/      these two only: a plain LoRA of rank 2r on the untouched base, [B, −B₀] [A; A₀] = BA − B₀A₀; any PEFT or
               vLLM loads it without knowing where it comes from
    merged/    an ordinary model folder, W + BA − B₀A₀

Each is written beside its final place and renamed, so a killed export leaves nothing half-written, and each is loaded
again and its logits compared with the trained model's.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.config import RunConfig
from ba_lora.errors import UserError
from ba_lora.io import disk_errors, folder_atomic
from ba_lora.methods import probe_logits
from ba_lora.model import load_base, load_tokenizer, model_source
from ba_lora.pissa import adapter_scaling, factors_path

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ba_lora.trainer import BALoRATrainer

# The largest |Δ logit| allowed between the trained model and what was exported: in float32 this number; in half
# precision, which rounds W + ΔW, a tenth of what training changed plus a few units in the last place.
FLOAT32_TOLERANCE = 1e-3
SHARE_OF_CHANGE = 0.1
ULPS = 4


def adapter_files(config: RunConfig) -> tuple[str, str]:
    """Return the names of the weights and settings in adapter/.

    PEFT rebuilds the residual of an exact PiSSA adapter when it loads it. It cannot rebuild a randomised one
    (pissa_niter_N) and would be wrong without an error, nor CorDA's: those are kept under names that it does not load.
    """
    if config.adapter.init in ("lora", "pissa"):
        return "adapter_model.safetensors", "adapter_config.json"
    return "trained.safetensors", "trained_config.json"


def serving_adapter(run_path: Path) -> Path:
    """Return the adapter folder that works on the untouched base: lora/ where there is one, else adapter/."""
    lora = run_path / "lora"
    return lora if lora.is_dir() else run_path / "adapter"


def probe_batch(rows: list[dict[str, Any]], pad_token_id: int, *, num_rows: int = 2, length: int = 128) -> dict:
    """Return the first rows, cut to `length` tokens, as the batch on which models are compared."""
    import torch

    ids = [row["input_ids"][:length] for row in rows[:num_rows]]
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
    }


def save_trained(trainer: "BALoRATrainer", config: RunConfig, run_path: Path) -> None:
    """Write the trained weights: adapter/ for adapters, merged/ for full fine-tuning. Every process calls it."""
    from ba_lora.adalora import set_saved_ranks

    target = run_path / ("merged" if config.adapter.trains_own_weights else "adapter")
    temporary = target.with_name(f".{target.name}.saving")
    main = trainer.accelerator.is_main_process
    trainer.model.config.use_cache = True  # what was off for training; generation wants it
    set_saved_ranks(trainer.plain_model())
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
                    _mend_adapter_files(folder, config)
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)


def tolerance(config: RunConfig, trained_logits: "torch.Tensor", pretrained_logits: "torch.Tensor | None") -> float:
    """Return the largest |Δ logit| allowed; infinite for a quantised base, whose exports are of the unquantised one."""
    import torch

    from ba_lora.model import torch_dtype

    if config.export.tolerance is not None:
        return config.export.tolerance
    if config.model.quantization != "none":
        return float("inf")
    if config.model.dtype == "float32":
        return FLOAT32_TOLERANCE
    learned = 0.0
    if pretrained_logits is not None:
        learned = (trained_logits - pretrained_logits).abs().max().item()
    last_place = torch.finfo(torch_dtype(config.model.dtype)).eps * trained_logits.abs().max().item()
    return SHARE_OF_CHANGE * learned + ULPS * last_place


def export_run(
    config: RunConfig,
    run_path: Path,
    probe: dict,
    trained_logits: "torch.Tensor",
    *,
    pretrained_logits: "torch.Tensor | None" = None,
) -> dict[str, float]:
    """Write lora/ and merged/ from adapter/, compare each with the trained model; return name → largest |Δ logit|.

    Raises UserError where a difference exceeds `tolerance`; the folder in question is kept as <name>.rejected.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if not trained_logits.isfinite().all():
        raise UserError(
            "the trained model's logits are not finite: training has diverged; lower trainer.learning_rate, "
            "adapter.alpha or the regularizers' λ"
        )
    unset_hf_deepspeed_config()  # or ZeRO-3 would split the models loaded here, on this process alone
    differences = {}
    allowed = tolerance(config, trained_logits, pretrained_logits)
    if config.adapter.trains_own_weights:
        merged = _load_merged(config, run_path / "merged")
        return {"merged": _compare("merged", merged, probe, trained_logits, allowed, run_path)}
    if config.adapter.init != "lora":
        convert_to_lora(run_path / "adapter", factors_path(run_path), run_path / "lora", config=config)
    model = _on_device(_with_adapter(config, serving_adapter(run_path)))
    name = serving_adapter(run_path).name
    differences[name] = _compare(name, model, probe, trained_logits, allowed, run_path)
    if config.export.merged:
        merge(model, run_path / "merged", config=config)
        del model
        model = _on_device(_load_merged(config, run_path / "merged"))
        differences["merged"] = _compare("merged", model, probe, trained_logits, allowed, run_path)
    return differences


def convert_to_lora(adapter_path: Path, initial_factors: Path, output_path: Path, *, config: RunConfig) -> None:
    """Write the plain LoRA equal to an adapter on a residual base: A' = [A; A₀], B' = [B, −B₀], rank 2r, same scaling.

    B'A' = BA − B₀A₀ exactly, so W + s B'A' = (W − s B₀A₀) + s BA, the trained model.
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights_name, settings_name = adapter_files(config)
    trained = load_file(adapter_path / weights_name)
    initial = load_file(initial_factors)
    if sorted(initial) != sorted(name for name in trained if ".lora_" in name):
        raise UserError(f"{adapter_path} and {initial_factors} hold different layers: they are of different runs")
    converted = {}
    for name, tensor in trained.items():
        if name not in initial:  # a classification head
            converted[name] = tensor
            continue
        first = initial[name].to(tensor.dtype)
        pair, axis = ([tensor, first], 0) if ".lora_A." in name else ([tensor, -first], 1)
        converted[name] = torch.cat(pair, dim=axis).contiguous()
    settings = json.loads((adapter_path / settings_name).read_text())
    rank = 2 * config.adapter.rank
    alpha = adapter_scaling(config.adapter) * rank
    settings |= {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": False,
        "init_lora_weights": True,
    }
    with folder_atomic(output_path) as folder:
        save_file(converted, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def merge(model: "nn.Module", output_path: Path, *, config: RunConfig) -> None:
    """Merge the adapter of a PEFT model into its base and write an ordinary model folder with its tokenizer."""
    merged = model.merge_and_unload(safe_merge=True)
    merged.config.use_cache = True
    with folder_atomic(output_path) as folder:
        merged.save_pretrained(folder)
        load_tokenizer(config.model, generates=config.kind == "nlg").save_pretrained(folder)


def push_to_hub(run_path: Path, config: RunConfig) -> str:
    """Upload the adapter that serves on the untouched base, and merged/ as a sub-folder; return the address."""
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        url = api.create_repo(config.hub.repo_id, private=config.hub.private, exist_ok=True)
        if not config.adapter.trains_own_weights:
            api.upload_folder(repo_id=config.hub.repo_id, folder_path=serving_adapter(run_path))
        if (run_path / "merged").is_dir():
            where = "." if config.adapter.trains_own_weights else "merged"
            api.upload_folder(repo_id=config.hub.repo_id, folder_path=run_path / "merged", path_in_repo=where)
    except (HTTPError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(
            f"cannot push to {config.hub.repo_id}: {str(error).splitlines()[0]}; run `hf auth login` and check "
            "hub.repo_id, then run the same command again (nothing is trained twice)"
        ) from error
    return str(url)


def _mend_adapter_files(folder: Path, config: RunConfig) -> None:
    """Name the untouched base in the settings, and give both files the names of `adapter_files`."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"] = model_source(config.model)
    settings["revision"] = config.model.revision
    path.write_text(json.dumps(settings, indent=2) + "\n")
    weights_name, settings_name = adapter_files(config)
    path.rename(folder / settings_name)
    (folder / "adapter_model.safetensors").rename(folder / weights_name)


def _with_adapter(config: RunConfig, adapter_path: Path) -> "nn.Module":
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(config, quantize=False), adapter_path).eval()


def _load_merged(config: RunConfig, path: Path) -> "nn.Module":
    return _on_device(load_base(config, source=str(path), quantize=False))


def _on_device(model: "nn.Module") -> "nn.Module":
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model


def _compare(
    name: str, model: "nn.Module", probe: dict, trained_logits: "torch.Tensor", allowed: float, run_path: Path
) -> float:
    difference = (probe_logits(model, probe) - trained_logits).abs().max().item()
    if not difference <= allowed:  # NaN fails too
        rejected = run_path / f"{name}.rejected"
        shutil.rmtree(rejected, ignore_errors=True)
        (run_path / name).rename(rejected)
        raise UserError(
            f"the exported {name}/ differs from the trained model by {difference:.3g} in a logit, allowed are "
            f"{allowed:.3g}: it is kept as {rejected.name}/; a larger export.tolerance accepts it"
        )
    return difference
