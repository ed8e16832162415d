"""For a trained folder that is there already, whoever trained it:

    python -m ba_lora.runs.convert convert ADAPTER --output DIR [--base MODEL] [--initial ADAPTER]
    python -m ba_lora.runs.convert merge ADAPTER --output DIR [--base MODEL]
    python -m ba_lora.runs.convert compare MODEL MODEL [--texts FILE.jsonl] [--tolerance 1e-3]

convert: a PiSSA adapter becomes a plain LoRA of twice the rank on the untouched base, which any PEFT or vLLM loads.
    ADAPTER is an adapter folder of PEFT (init_lora_weights pissa) or of a run of ours. Its first factors are the
    adapter saved before training (--initial, PEFT's own way; a run of ours has them in initial/), or are computed again
    from the base, which only an exact PiSSA allows (not pissa_niter_N).
merge: the adapter becomes part of its base, an ordinary model folder. Of PiSSA: convert first.
compare: the logits of two folders (models, or adapters on their base) on the same texts: largest and mean difference,
    KL divergence of the second from the first, and how often both have the same most likely token. Leaves with status 1
    where the largest difference is above --tolerance, or no number. Of an adapter whose base cannot be made again
    (pissa_niter_N, CorDA, …): convert first.

--base names the base where the adapter's own adapter_config.json does not, or names a place that is no longer.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ba_lora.errors import CommandParser, UserError, in_one_line, run_entry_point
from ba_lora.io import disk_errors, folder_atomic, load_tensors, read_json, read_jsonl
from ba_lora.models.layers import is_residual_init
from ba_lora.models.source import hub_errors
from ba_lora.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXTS = ("The capital of France is", "def add(a, b):\n    return", "2 + 2 =", "Was ist ein Baum?")
PUBLISHED = ADAPTER_WEIGHTS, ADAPTER_CONFIG
KEPT = ("trained.safetensors", "trained_config.json")  # of a randomised PiSSA of ours, which PEFT must not load


def main() -> int:
    parser = CommandParser(
        prog="python -m ba_lora.runs.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True, parser_class=CommandParser)
    for verb in ("convert", "merge"):
        one = verbs.add_parser(verb)
        one.add_argument("adapter", type=Path)
        one.add_argument("--output", type=Path, required=True)
        one.add_argument("--base")
        if verb == "convert":
            one.add_argument("--initial", type=Path)
    two = verbs.add_parser("compare")
    two.add_argument("models", nargs=2, metavar="MODEL")
    two.add_argument("--texts", type=Path)
    two.add_argument("--tolerance", type=float, default=1e-3)
    asked = parser.parse_args()
    if asked.verb == "compare":
        found = compare_models(*asked.models, texts=read_texts(asked.texts))
        print(json.dumps(found))
        return int(not found["max_difference"] <= asked.tolerance)  # also where it is NaN
    if asked.output.exists() and not (asked.output.is_dir() and not any(asked.output.iterdir())):
        fault = "is not empty" if asked.output.is_dir() else "is a file"
        raise UserError(f"--output: {asked.output} {fault}: name a new folder")
    if asked.verb == "convert":
        convert(asked.adapter, asked.output, base=asked.base, initial=asked.initial)
    else:
        merge_adapter(asked.adapter, asked.output, base=asked.base)
    print(f"written to {asked.output}")
    return 0


def convert(adapter: Path, output: Path, *, base: str | None = None, initial: Path | None = None) -> None:
    """Write the plain LoRA that a PiSSA adapter is on the untouched base. Raises UserError where it is none, and where
    its first factors are not known."""
    from ba_lora.training.plain_lora import write_plain_lora

    weights, settings = adapter_parts(adapter)
    form = str(settings.get("init_lora_weights"))
    if not _changes_base(settings) and initial is None:
        raise UserError(
            f"{adapter} has init_lora_weights={form}: it is a plain LoRA already, there is nothing to convert"
        )
    own = adapter.parent / "initial"
    if initial is None and own.is_dir() and next(own.glob("*.safetensors"), None):
        initial = own
    if initial is not None:
        file = next(iter(sorted(Path(initial).glob("*.safetensors"))), None)
        if file is None:
            raise UserError(f"--initial: {initial} holds no safetensors file with the first factors")
        factors = load_tensors(file)
    elif form == "pissa":
        factors = _computed_again(settings, base_of(adapter, settings, base))
    else:
        raise UserError(
            f"{adapter}: the first factors of {form} are random or made of data: give --initial, the adapter as it was "
            "saved before training"
        )
    with disk_errors(output), folder_atomic(output) as folder:
        write_plain_lora(folder, load_tensors(weights), factors, settings)
        _copy_tokenizer(adapter, folder)


def _computed_again(settings: dict[str, Any], base: str) -> "dict[str, Tensor]":
    """Return A₀ and B₀ of an exact PiSSA: the leading components of the base's weights, in float32."""
    from peft import LoraConfig, get_peft_model

    from ba_lora.training.plain_lora import initial_factors

    known = {name: value for name, value in settings.items() if name in LoraConfig.__dataclass_fields__}
    config = LoraConfig(**{**known, "inference_mode": False, "peft_type": None})
    return initial_factors(get_peft_model(_load(base, settings), config))


def merge_adapter(adapter: Path, output: Path, *, base: str | None = None) -> None:
    """Write the model that a plain LoRA and its base are together, in the base's dtype, with the tokenizer."""
    _, settings = adapter_parts(adapter)
    if _changes_base(settings):
        raise UserError(f"{adapter} belongs to a changed base: make it a plain LoRA with convert, then merge that")
    source = base_of(adapter, settings, base)
    merged = _on_base(adapter, source, settings).merge_and_unload(safe_merge=True)
    with disk_errors(output), folder_atomic(output) as folder:
        merged.save_pretrained(folder)
        if not _copy_tokenizer(adapter, folder):
            _tokenizer(source, settings).save_pretrained(folder)


def compare_models(first: str, second: str, *, texts: list[str]) -> dict[str, float]:
    """Return how far the logits of two causal models are from each other on `texts`, in float32."""
    import torch

    found = []
    with torch.inference_mode():
        for name in (first, second):
            model, tokenizer = _open(name)
            rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
            if found and any(
                ids.shape != known.shape or (ids != known).any() for ids, (known, _) in zip(rows, found[0], strict=True)
            ):
                raise UserError(
                    f"{first} and {second} tokenize the texts differently: their logits are of other tokens"
                )
            found.append([(ids, model(ids).logits.float()[0]) for ids in rows])
            del model
    ours, theirs = (torch.cat([logits for _, logits in rows]) for rows in found)
    if ours.shape != theirs.shape:
        raise UserError(f"vocabularies of {ours.shape[1]} and {theirs.shape[1]}: these models cannot be compared")
    difference = (ours - theirs).abs()
    kl = torch.nn.functional.kl_div(
        theirs.log_softmax(-1), ours.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return {
        "max_difference": difference.max().item(),
        "mean_difference": difference.mean().item(),
        "kl": kl.item(),
        "same_token": (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item(),
        "positions": len(ours),
    }


def read_texts(file: Path | None) -> list[str]:
    """Return the first text of each row of a jsonl file, else TEXTS."""
    if file is None:
        return list(TEXTS)
    texts = [
        next((value for value in row.values() if isinstance(value, str) and value), None) for row in read_jsonl(file)
    ]
    if not all(texts):
        raise UserError(f"{file}, row {texts.index(None)} has no text")
    return texts


def adapter_parts(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return an adapter's file of weights and its settings. Raises UserError where a folder holds none."""
    for weights, settings in (PUBLISHED, KEPT):
        if (folder / weights).is_file() and (folder / settings).is_file():
            plain = read_json(folder / settings)
            if plain.get("peft_type") != "LORA":
                raise UserError(f"{folder} is an adapter of {plain.get('peft_type')}, and only LoRA's can be converted")
            if plain.get("loftq_config"):
                raise UserError(f"{folder} makes up for the rounding of its 4-bit base (LoftQ): take the run's merged/")
            return folder / weights, plain
    raise UserError(f"{folder} holds no adapter: {' and '.join(PUBLISHED)} are needed (no pickles)")


def base_of(adapter: Path, settings: dict[str, Any], base: str | None) -> str:
    """Return the base's name. Raises UserError where nobody names it."""
    found = base or settings.get("base_model_name_or_path")
    if not found:
        raise UserError(f"{adapter / PUBLISHED[1]} names no base: give --base MODEL")
    return found


def _changes_base(settings: dict[str, Any]) -> bool:
    return is_residual_init(settings.get("init_lora_weights"))


def _load(source: str, settings: dict[str, Any], dtype: str = "auto") -> "nn.Module":
    from transformers import AutoModelForCausalLM

    with hub_errors(source, "model"):
        return AutoModelForCausalLM.from_pretrained(source, revision=settings.get("revision"), dtype=dtype)


def _tokenizer(source: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    with hub_errors(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, revision=settings.get("revision"))


def _on_base(adapter: Path, source: str, settings: dict[str, Any], dtype: str = "auto") -> Any:
    from peft import PeftModel

    model = _load(source, settings, dtype)
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{adapter} does not fit the base {source}: {in_one_line(error)}") from error


def _open(name: str) -> tuple["nn.Module", Any]:
    """Return a model in float32, an adapter on its base, and the tokenizer; PEFT takes an exact PiSSA from the base."""
    path = Path(name)
    if not any((path / settings).is_file() for _, settings in (PUBLISHED, KEPT)):
        return _load(name, {}, "float32").eval(), _tokenizer(name, {})
    _, settings = adapter_parts(path)
    if _changes_base(settings) and settings["init_lora_weights"] != "pissa":
        raise UserError(
            f"{path} belongs to a base that {settings['init_lora_weights']} changed, which cannot be made again: make "
            "it a plain LoRA with convert, then compare that"
        )
    source = base_of(path, settings, None)
    return _on_base(path, source, settings, "float32").eval(), _tokenizer(source, settings)


def _copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files, where a folder has them; return whether it has."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    for name in names:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())
    return (source / "tokenizer.json").is_file()


if __name__ == "__main__":
    run_entry_point(main)
