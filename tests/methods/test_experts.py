"""Models with fused experts: every method adapts the same layers, and vLLM is not given adapters of experts."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from ba_lora.config.schema import AdapterConfig, ModelConfig
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.errors import UserError
from ba_lora.methods.build import build_model, left_out_experts
from eval.engines import adapters
from eval.engines.base import EngineOptions
from eval.engines.open import open_engine
from eval.engines.serving import plan_serving
from tests.support.tiny import save_tiny_model, tiny_moe

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.fixture(scope="module", params=[(), (0,)], ids=["experts", "first_layer_dense"])
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("moe"), model=tiny_moe(dense_layers=request.param))


def build(base: Path, run_path: Path, init: str, targets: object = "all-linear") -> torch.nn.Module:
    adapter = AdapterConfig(rank=4, init=init, target_modules=targets)
    config = NLGConfig(model=ModelConfig(name=str(base), dtype="float32"), adapter=adapter)
    return build_model(config, run_path=run_path, num_steps=10)[0]


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_and_pissa_adapt_the_same_layers_and_no_expert(moe: Path, tmp_path: Path) -> None:
    lora, pissa = build(moe, tmp_path / "lora", "lora"), build(moe, tmp_path / "pissa", "pissa")
    assert trained(lora) == trained(pissa)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained(lora)}
    assert adapted == ATTENTION  # PEFT takes the names of a dense layer's MLP for the experts', too
    assert len([name for name in trained(lora) if "q_proj" in name]) == 4  # A and B in both layers
    note = left_out_experts(lora)
    assert "k_proj, o_proj, q_proj" in note and "experts" in note and "\n" not in note


def test_models_without_experts_have_no_such_line(tiny_model: Path, tmp_path: Path) -> None:
    model = build(tiny_model, tmp_path, "lora")
    assert left_out_experts(model) is None
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained(model)} == ATTENTION | {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


@pytest.mark.parametrize("targets", [["q_proj", "gate_proj", "up_proj", "down_proj"], ["q_proj", "down_proj"]])
@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_layers_that_peft_takes_for_the_experts_are_refused(
    moe: Path, tmp_path: Path, init: str, targets: list[str]
) -> None:
    with pytest.raises(UserError, match="adapter.target_modules") as error:
        build(moe, tmp_path, init, targets)
    assert "\n" not in str(error.value)


def test_a_gate_of_one_output_is_told_and_the_layers_that_are_named_instead_do(tmp_path: Path) -> None:
    """Qwen2-MoE's shared expert has one, a linear layer."""
    settings = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"shared_expert_intermediate_size": 24, "num_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(Qwen2MoeConfig(**settings, **heads, **experts))
    base = save_tiny_model(tmp_path / "base", model=model)
    with pytest.raises(UserError, match="shared_expert_gate, a gate of one output") as error:
        build(base, tmp_path / "run", "lora")
    assert "\n" not in str(error.value)
    named = str(error.value).partition("adapter.target_modules=[")[2].rstrip("]").split(",")
    assert set(named) == ATTENTION | {"gate_proj", "up_proj", "down_proj"}
    assert len(trained(build(base, tmp_path / "run", "lora", named))) == 2 * 7


@pytest.mark.parametrize("method", ["lora", "ba_lora"])
def test_a_model_with_experts_trains_exports_and_is_served_hot(train, moe: Path, method: str) -> None:  # noqa: ANN001
    run = train(f"model.name={moe}", "trainer.max_steps=2", method=method)
    (job,) = plan_serving([str(run)], serve="hot")
    assert job.adapter == run / ("lora" if method == "ba_lora" else "adapter") and job.base == str(moe)
    adapters.check_adapter(job.adapter, job.base, EngineOptions())
    with open_engine("hf", job.base, adapters={"a": job.adapter}) as engine:
        hot = engine.generate(["Tom has 3 balls."], adapter="a", max_new_tokens=8)
    with open_engine("hf", run / "merged") as engine:
        assert engine.generate(["Tom has 3 balls."], max_new_tokens=8) == hot


def test_an_adapter_of_experts_is_served_merged(tmp_path: Path) -> None:
    """What PEFT's own all-linear makes of Qwen3-MoE: right with transformers, and vLLM's hot path dies of it."""
    base = save_tiny_model(tmp_path / "base", model=tiny_moe())
    runs = []
    for name in ("one", "two"):
        run = tmp_path / name
        model = AutoModelForCausalLM.from_pretrained(base)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.save_pretrained(run / "adapter")
        adapters.check_adapter(run / "adapter", str(base), EngineOptions())
        save_tiny_model(run / "merged", model=model.merge_and_unload())
        (run / "config.yaml").write_text(f"name: tiny\nmethod: lora\nmodel:\n  name: {base}\n  dtype: float32\n")
        runs.append(str(run))
    assert adapters.read_adapter(tmp_path / "one" / "adapter")["target_parameters"]
    assert [job.served for job in plan_serving(runs)] == ["merged", "merged"]
    with pytest.raises(UserError, match="cannot be served hot"):
        plan_serving(runs, serve="hot")
