"""EVA: which directions a layer begins with, how the ranks go round, and what it waits for."""

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from ba_lora.errors import UserError
from ba_lora.methods.base import TrainingRows
from ba_lora.methods.build import build_model, probe_logits
from ba_lora.methods.eva import Eva
from ba_lora.methods.pissa import named_adapter_layers
from ba_lora.methods.rows import batches
from ba_lora.models.classifier import load_classifier
from ba_lora.models.pretrained import load_base
from tests.support.methods import LAYERS, built
from tests.support.tiny import tiny_llama, tiny_rows
from tests.support.tiny_nlu import nlu_config, tiny_pairs

RANK = 4


def inputs_of(model: nn.Module, path: str, batch: dict[str, Tensor], mask: Tensor) -> Tensor:
    """The inputs of a layer at the masked tokens, centred, [N, in]."""
    caught = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
    with torch.no_grad():
        model.eval()(**batch)
    handle.remove()
    found = caught[0][mask]
    return found - found.mean(0)


def share_of_the_best(inputs: Tensor, directions: Tensor) -> float:
    """How much of the variance in the top singular vectors lies in these directions."""
    _, values, _ = torch.linalg.svd(inputs, full_matrices=False)
    return ((inputs @ directions.T).square().sum() / values[: len(directions)].square().sum()).item()


def check_directions(model: nn.Module, base: nn.Module, batch: dict[str, Tensor], mask: Tensor, other: Tensor) -> None:
    """A's rows are the top singular vectors of the inputs at the tokens of `mask`, which those of `other` are not."""
    layers = dict(named_adapter_layers(model))
    for name in [name for name in layers if name.endswith(("1.mlp.down_proj", "1.output.dense"))]:
        first = layers[name].lora_A["default"].weight.detach()
        assert not layers[name].lora_B["default"].weight.any()
        torch.testing.assert_close(first @ first.T, torch.eye(len(first)), atol=1e-4, rtol=0)
        path = name.removeprefix("base_model.model.")
        share, others = (share_of_the_best(inputs_of(base, path, batch, at), first) for at in (mask, other))
        assert share > 0.998 and others < share - 1e-3, (share, others)


def test_the_first_rows_are_the_directions_of_the_inputs_at_tokens_that_are_trained_on(base, tmp_path):
    _, model, _, _ = built("eva", base, tmp_path, "adapter.options={rows: 24, batch_size: 24, rho: 1, tau: 0.999}")
    (batch,) = batches(tiny_llama(), TrainingRows(tiny_rows(24), 0), num_rows=24, batch_size=24)
    check_directions(model, tiny_llama(), batch, batch["labels"] != -100, batch["attention_mask"] == 1)


def test_a_classifier_takes_the_inputs_at_all_real_tokens(tiny_encoder, tmp_path):
    words = ["adapter.options={rows: 12, batch_size: 12, rho: 1, tau: 0.999}"]
    config, rows = nlu_config(tiny_encoder, *words, method="eva"), tiny_pairs(tiny_encoder, 12)
    model, _ = build_model(config, run_path=tmp_path, num_steps=4, rows=rows)
    base = load_classifier(config)
    (batch,) = batches(base, TrainingRows(rows, 0), num_rows=12, batch_size=12)
    real = batch["attention_mask"] == 1
    assert not real.all()
    check_directions(model, base, batch, real, torch.ones_like(real))


def test_with_rslora_too_every_rank_has_the_same_scaling(base, tmp_path):
    """PEFT lets α go with the rank, which rsLoRA divides by the rank's root only."""
    words = ("adapter.alpha=8", "adapter.rslora=true")
    config, model, _, probe = built("eva_of_unequal_ranks", base, tmp_path / "run", *words)
    layers = dict(named_adapter_layers(model))
    assert len({layer.r["default"] for layer in layers.values()}) > 1
    for layer in layers.values():
        assert layer.scaling["default"] == pytest.approx(8 / RANK**0.5)
        layer.lora_B["default"].weight.data.normal_()
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(load_base(config), tmp_path / "saved")
    torch.testing.assert_close(probe_logits(loaded, probe), probe_logits(model, probe), atol=1e-5, rtol=1e-5)


def test_ranks_go_where_the_variance_is_and_the_scaling_stays(base, tmp_path):
    """All together L r, at most ρ r each; what is saved is a LoRA with a rank for each layer, for plain PEFT."""
    config, model, step_zero, probe = built("eva_of_unequal_ranks", base, tmp_path, "adapter.alpha=8")
    layers = dict(named_adapter_layers(model))
    ranks = [layer.r["default"] for layer in layers.values()]
    assert sum(ranks) == LAYERS * RANK and max(ranks) <= 2 * RANK and len(set(ranks)) > 1
    for layer in layers.values():
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert first.shape[0] == second.shape[1] == layer.r["default"]
        assert layer.scaling["default"] == pytest.approx(2)
        second.data = torch.randn_like(second)
    assert step_zero.difference == 0
    model.save_pretrained(tmp_path / "adapter")
    logits = probe_logits(model, probe)
    again = PeftModel.from_pretrained(load_base(config), tmp_path / "adapter")
    torch.testing.assert_close(probe_logits(again, probe), logits, atol=1e-5, rtol=0)
    assert (logits - probe_logits(load_base(config), probe)).abs().max() > 1e-2


def test_batches_too_small_for_peft_are_left_out_and_refused_where_there_are_no_others(base, tmp_path, monkeypatch):
    """PEFT skips a batch of fewer tokens than directions, and begins again after the last one: for ever."""
    given = []

    def seen(model, batches, **_):
        given.extend(batches)
        raise RuntimeError("seen")

    monkeypatch.setattr("peft.tuners.lora.eva.get_eva_state_dict", seen)
    with pytest.raises(RuntimeError, match="seen"):
        built("eva", base, tmp_path, "adapter.options={rows: 24, batch_size: 1, rho: 2}")
    counts = [int((batch["labels"] != -100).sum()) for batch in given]
    responses = [sum(label != -100 for label in row["labels"]) for row in tiny_rows(24)]
    assert 0 < len(counts) < 24 and min(counts) >= 8 and len(counts) == sum(count >= 8 for count in responses)
    given.clear()
    with pytest.raises(UserError, match=r"needs batches of 28 tokens \(ρ r\), the largest has \d+: raise") as error:
        built("eva", base, tmp_path, "adapter.options={rows: 24, batch_size: 1, rho: 7}")
    assert not given and "\n" not in str(error.value)


def test_a_classifiers_batches_count_by_their_real_tokens(tiny_encoder):
    rows = tiny_pairs(tiny_encoder, 4)
    given = batches(tiny_llama(), TrainingRows(rows, 0), num_rows=4, batch_size=2)
    init = Eva(nlu_config(tiny_encoder, "adapter.rank=3", method="eva").adapter)
    assert len(init._large_enough(given, "nlu")) == 2
