"""eval/engines/adapters.py: an adapter that an engine would leave out in silence, or that is damaged, is refused by
both."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ba_lora.errors import UserError
from eval.engines import adapters
from eval.engines import open as engines
from eval.engines.base import EngineOptions
from eval.engines.open import open_engine
from tests.eval.engines.test_engines import save_adapter, save_model

FILE = "adapter_model.safetensors"
EMBEDDING = "base_model.model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "good", base, seed=1)


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    return _weights(lambda weights: {name.replace(old, new): tensor for name, tensor in weights.items()})


def _weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / FILE)), folder / FILE)


def _settings(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))


def _pickled(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / FILE)
        (folder / FILE).unlink()
        torch.save(weights, folder / name)

    return change


DAMAGES = {
    "compiled": (_renamed("base_model.model.", "base_model.model._orig_mod."), "12 of its .*_orig_mod"),
    "no prefix": (_renamed("base_model.model.", ""), "12 belong to no layer, such as model.layers"),
    "a layer missing": (_weights(lambda w: {k: v for k, v in w.items() if ".1." not in k}), "6 of its .*layers.1"),
    "a layer too many": (
        _weights(lambda w: w | {k.replace(".1.", ".2."): v.clone() for k, v in w.items()}),
        "6 belong to no layer, such as .*layers.2",
    ),
    "only A": (_weights(lambda w: {k: v for k, v in w.items() if "lora_A" in k}), "6 of its .*lora_B"),
    "settings of fewer layers": (_settings(target_modules=["q_proj"]), "8 belong to no layer"),
    "another rank": (_settings(r=2), r"size mismatch for .*lora_A.weight: .*\[4, 64\].*\[2, 64\]"),
    "added tokens": (_weights(lambda w: w | {EMBEDDING: torch.zeros(50, 64)}), r"embed_tokens.weight.*\[50, 64\]"),
    "the base's embedding": (_weights(lambda w: w | {EMBEDDING: torch.zeros(47, 64)}), "change the base.*merge"),
    "cut short": (_bytes(lambda data: data[:-100]), "damaged or cut short"),
    "empty": (_bytes(lambda data: b""), "damaged or cut short"),
    "pickle by the right name": (_pickled(FILE), "is a pickle.*save the adapter as"),
    "pickle": (_pickled("adapter_model.bin"), "adapter_model.bin is a pickle"),
    "no weights": (lambda folder: (folder / FILE).unlink(), "has no adapter_model.safetensors"),
    "no object": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "a JSON object is needed"),
    "unknown type": (_settings(peft_type="NOPE"), "cannot be read by PEFT"),
    "a rank in words": (_settings(r="four"), "does not fit the base"),
    "layers of another model": (_settings(target_modules=["c_attn"]), "c_attn.* not found"),
    "a head that is not there": (_settings(modules_to_save=["lm_head"]), "lm_head.weight is missing"),
}


@pytest.mark.parametrize("kind", ["hf", "vllm"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_both_engines_refuse_what_does_not_fit(
    base: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: str
) -> None:
    change, message = DAMAGES[damage]
    folder = shutil.copytree(good, tmp_path / "adapter")
    change(folder)
    monkeypatch.setattr(
        engines, "choose_engine", lambda name, *_: name
    )  # before vLLM is imported, if it is there at all
    with pytest.raises(UserError, match=message) as error, open_engine(kind, base, adapters={"a": folder}):
        pass
    assert "\n" not in str(error.value) and "checked" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, rank_pattern={"layers.1": 2}, task_type="CAUSAL_LM"),
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        AdaLoraConfig(init_r=6, target_r=4, total_step=20, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=lambda settings: settings.peft_type.value + ("-dora" if getattr(settings, "use_dora", False) else ""),
)
def test_adapters_of_every_kind_pass_as_peft_saves_them(base: Path, tmp_path: Path, settings: object) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(tmp_path)
    adapters.check_adapter(tmp_path, str(base), EngineOptions())


def test_an_adapter_of_another_size_of_base_is_refused(good: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="size mismatch for .*up_proj"):
        adapters.check_adapter(good, str(tiny_model), EngineOptions())


def test_what_vllm_cannot_serve_hot() -> None:
    assert adapters.hot_obstacle({"peft_type": "LORA", "r": 256, "bias": "none"}) is None
    for settings in (
        {"peft_type": "LOHA"},
        {"peft_type": "ADALORA"},
        {"peft_type": "LORA", "use_dora": True},
        {"peft_type": "LORA", "r": 8, "rank_pattern": {"layers.0": 600}},
        {"peft_type": "LORA", "r": 8, "modules_to_save": ["lm_head"]},
        {"peft_type": "LORA", "r": 8, "target_parameters": ["gate_up_proj"]},
        {"peft_type": "LORA", "r": 8, "bias": "lora_only"},
    ):
        assert adapters.hot_obstacle(settings)


def _edit_base(folder: Path, change: Callable[[dict], dict]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k.replace("model.", "model._orig_mod."): v for k, v in w.items()}, "lacks .*_orig_mod"),
        (lambda w: {k: v for k, v in w.items() if "layers.1.self_attn" not in k}, "lacks 4 weights of its model"),
        (lambda w: w | {"model.norm.weight": torch.ones(32)}, "model.norm.weight"),
    ],
    ids=["compiled", "missing", "another shape"],
)
def test_a_base_with_weights_made_up_at_random_is_refused(
    base: Path, tmp_path: Path, change: Callable[[dict], dict], message: str
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    _edit_base(folder, change)
    with pytest.raises(UserError, match=message) as error, open_engine("hf", folder):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"PK" + data], ids=["cut short", "pickle"])
def test_a_damaged_base_is_one_line(base: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="damaged or cut short") as error, open_engine("hf", folder):
        pass
    assert "\n" not in str(error.value)


def test_a_base_of_pickles_is_one_line(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors weights.*convert") as error, open_engine("hf", folder):
        pass
    assert "\n" not in str(error.value)
