"""What a method cannot do is said in one line that names the cause, before anything is trained."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, OPTConfig, Trainer

from ba_lora.config.schema import BALoRAConfig
from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.errors import UserError
from ba_lora.methods.base import TrainingMethod
from ba_lora.methods.build import build_model
from tests.support.methods import CASES, built, config_of, trainer_of
from tests.support.tiny import arguments
from tests.support.tiny_nlu import classifier_trainer, nlu_config, save_tiny_encoder, tiny_classifier

LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
MODELS = {
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2),
    "grouped": LlamaConfig(**LLAMA, num_key_value_heads=2),
    "gemma": GemmaConfig(**LLAMA, num_key_value_heads=4, head_dim=8),
    "opt": OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def refused(match: str):
    """Expect a UserError of one line; `match` is in it as it stands."""
    return pytest.raises(UserError, match=rf"\A[^\n]*{re.escape(match)}[^\n]*\Z")


NO_LAYER = "has no layer for the Conv1D layers of this gpt2 model: choose another method"
ONE_KIND = "adapter.target_modules=[q_proj]"
SIZES = "adapter.tuner=lorta needs q, k, v and o of one size, which this {} model has not"


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        *((method, "gpt2", f"adapter.tuner={method} {NO_LAYER}") for method in ("loha", "peanut", "miss", "ssf")),
        ("lorta", "gpt2", SIZES.format("gpt2")),
        ("lorta", "grouped", SIZES.format("llama")),
        ("ssf", "gemma", "adapter.options.shift=true needs layers with a bias, and 7 of this gemma model have none"),
        ("houlsby", "opt", "adapter.tuner=bottleneck does not know the sub-layers of this opt model"),
        ("pfeiffer", "opt", "adapter.tuner=bottleneck does not know the sub-layers of this opt model"),
    ],
)
def test_an_architecture_that_a_method_is_not_for(method, model, message, models, tmp_path):
    with refused(message):
        built(method, models / model, tmp_path)


def test_ssf_without_its_shift_is_for_layers_without_a_bias(models, tmp_path):
    _, model, step_zero, _ = built("ssf", models / "gemma", tmp_path, "adapter.options.shift=false")
    assert step_zero.difference == 0 and not any("ssf_shift" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("method", ["eva", "corda", "lora_ga", "sam"])
def test_a_method_that_runs_rows_first_without_any(method, base, tmp_path):
    with refused(f"method {method} runs training rows first, and none were given to build_model"):
        build_model(config_of(method, base), run_path=tmp_path, num_steps=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("lora_ga", ("adapter.rank=17",), "2r components of each gradient: adapter.rank=17 is above half the size of"),
        ("lora", ("adapter.rank=33",), "adapter.rank=33 is above the size of"),
        ("adalora", ("adapter.rank=22",), "adapter.rank=22 (adalora starts at 33) is above the size of"),
        ("eva", ("adapter.options={rows: 4, batch_size: 1, rho: 7}",), "adapter.init=eva needs batches of 28 tokens"),
        ("lora", (ONE_KIND, "adapter.options.layers_to_transform=[7]"), "Target modules {'q_proj'} not found"),
        ("lora", (ONE_KIND, "adapter.options.exclude_modules=[q_proj]"), "No modules were targeted for adaptation"),
        ("delta_lora", ("adapter.options.start=9",), "adapter.options.start=9: the run has 4 optimizer steps"),
    ],
)
def test_sizes_that_do_not_fit(method, words, message, base, tmp_path):
    with refused(message):
        built(method, base, tmp_path, *words)
    assert not (tmp_path / "initial_factors.safetensors").exists()


def test_adalora_in_too_few_steps(base, tmp_path):
    with refused("adapter.tuner=adalora prunes over the steps and needs at least 10, this run has 9"):
        build_model(config_of("adalora", base), run_path=tmp_path, num_steps=9)


@pytest.mark.parametrize(("share", "at"), [("0.05", 0), ("0.95", 8)])
def test_sara_chooses_again_within_the_steps(share, at, base, tmp_path):
    config = config_of("sara", base, f"adapter.options.reselect={share}")
    with refused(
        f"adapter.options.reselect={share} of 8 steps is step {at}: it must lie between the first step and the last"
    ):
        build_model(config, run_path=tmp_path, num_steps=8)


@pytest.mark.parametrize("method", ["monteclora", "monteclora_on_pissa"])
def test_monteclora_in_half_precision(method, base):
    with refused("adapter.dtype=base with model.dtype=bfloat16: adapter.tuner=monteclora trains in float32 only"):
        config_of(method, base, "model.dtype=bfloat16", "adapter.dtype=base")
    config_of(method, base, "adapter.dtype=base")  # the base's is float32


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_have_no_reference(method, base, tmp_path):
    consistency = BALoRAConfig(lambda_consistency=0.5, lambda_diversity=0, lambda_svd=0)
    with refused("would not begin at 0; set regularizers.lambda_consistency=0"):
        trainer_of(method, base, tmp_path, regularizers=consistency)


def test_nmtune_has_no_reference(tiny_encoder, tmp_path):
    model = tiny_classifier(tiny_encoder, method="nmtune")
    consistency = NLURegularizersConfig(lambda_consistency=0.5, lambda_diversity=0, lambda_svd=0)
    with refused("NMTune has BA-LoRA's terms itself: set regularizers.lambda_consistency=0"):
        classifier_trainer(model, arguments(tmp_path), regularizers=consistency)


def test_nmtune_is_not_for_decoders(tmp_path):
    folder = save_tiny_encoder(tmp_path / "gpt2", "gpt2-xl")
    with refused("adapter.tuner=nmtune is for encoders, and gpt2 is a decoder"):
        build_model(nlu_config(folder, method="nmtune"), run_path=tmp_path / "run", num_steps=4)


NOT_UNDER_DEEPSPEED = {
    "adalora": "AdaLoRA ranks directions by gradients",
    "delta_lora": "Delta-LoRA reads the factors of a layer between steps",
    "dylora": "DyLoRA sets gradients of single rows",
    "lora_fa": "LoRA-FA needs the factors of a layer together",
    "lora_pro": "LoRA-Pro needs the factors of a layer together",
    "lorta": "LoRTA's layers share their tensors",
    "prefix_tuning": "virtual tokens are not tried under DeepSpeed",
    "prompt_tuning": "virtual tokens are not tried under DeepSpeed",
    "sara": "SaRA sets single gradients and moments",
}


def test_every_method_says_whether_it_runs_under_deepspeed(base):
    said = {method for method in CASES if TrainingMethod.of(config_of(method, base).adapter, seed=0).no_deepspeed}
    assert said - {"lora_fa_on_pissa", "lora_pro_on_pissa"} == NOT_UNDER_DEEPSPEED.keys()


@pytest.mark.parametrize("method", NOT_UNDER_DEEPSPEED)
def test_what_cannot_run_under_deepspeed_is_told_by_the_config(method, base):
    with refused(NOT_UNDER_DEEPSPEED[method]):
        config_of(method, base, "trainer.deepspeed=configs/deepspeed/zero2.json")


@pytest.mark.parametrize("method", ["sam", "peanut", "eva", "lora_ga", "corda"])
def test_what_cannot_run_under_zero3_is_told_by_the_config(method, base):
    for settings in ("configs/deepspeed/zero3.json", "{zero_optimization: {stage: 3}}"):
        with refused("ZeRO-3"):
            config_of(method, base, f"trainer.deepspeed={settings}")
    for settings in ("configs/deepspeed/zero2.json", "{zero_optimization: true}", "{}"):
        config_of(method, base, f"trainer.deepspeed={settings}")


@pytest.mark.parametrize("method", NOT_UNDER_DEEPSPEED)
def test_what_cannot_run_under_deepspeed(method, base, tmp_path, monkeypatch):
    make = Trainer.create_accelerator_and_postprocess

    def under_deepspeed(self):
        make(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", under_deepspeed)
    with refused(f"{NOT_UNDER_DEEPSPEED[method]}") as error:
        trainer_of(method, base, tmp_path)
    assert str(error.value).endswith(": use DDP or one process")
