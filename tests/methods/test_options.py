"""Each key of adapter.options that a method takes changes what comes of a run.

`OTHERS` has an entry for each: another value than the case's. A new key without one fails.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ba_lora.config.layers import load_config
from ba_lora.config.registries import facts, parts
from ba_lora.config.schema import training_hash, training_settings
from tests.support.methods import equal, nlu_trainer_of, trainer_of
from tests.support.tiers import mostly_slow
from tests.support.tiny import adapter_weights


class Other(NamedTuple):
    """method: of whose case it is an option. beside: what the run has with and without it. steps: of the run, None for
    the case's."""

    method: str
    value: str
    beside: tuple[str, ...] = ()
    steps: int | None = 2


OTHERS = {
    "adalora.tinit": Other("adalora", "4", steps=None),
    "adalora.tfinal": Other("adalora", "6", steps=None),
    "adalora.deltaT": Other("adalora", "5", steps=None),
    "adalora.beta1": Other("adalora", "0.1", steps=None),
    "adalora.beta2": Other("adalora", "0.1", steps=None),
    "adalora.orth_reg_weight": Other("adalora", "5.0", steps=None),
    "bottleneck.places": Other("houlsby", "mlp"),
    "bottleneck.activation": Other("houlsby", "relu"),
    "delta_lora.weight": Other("delta_lora", "0.5", steps=None),
    "delta_lora.start": Other("delta_lora", "2", steps=None),
    "dylora.frozen": Other("dylora", "false", steps=None),
    "dylora.restore": Other("dylora", "true", steps=None),
    "eva.rho": Other("eva", "2"),
    "eva.tau": Other("eva", "0.2"),
    "eva.rows": Other("eva", "8"),
    "eva.batch_size": Other("eva", "8"),
    "loha.rank_dropout": Other("loha", "0.5"),
    "lora_ga.rows": Other("lora_ga", "4"),
    "lora_ga.gamma": Other("lora_ga", "4.0"),
    "lora_plus.lr_ratio": Other("lora_plus", "2.0"),
    "lora_pro.form": Other("lora_pro", "efficient"),
    "miss.init_weights": Other("miss", "bat"),
    "miss.mini_r": Other("miss", "8", ("adapter.options.init_weights=mini",)),
    "monteclora.num_samples": Other("monteclora", "2"),
    "monteclora.sample_scaler": Other("monteclora", "0.1"),
    "monteclora.dirichlet_prior": Other("monteclora", "0.1", ("adapter.options.kl_loss_weight=0.01",)),
    "monteclora.kl_loss_weight": Other("monteclora", "0.01"),
    "monteclora.use_entropy": Other("monteclora", "false"),
    "nmtune.weight": Other("nmtune", "0.5"),
    "nmtune.expansion": Other("nmtune", "2.0"),
    "peanut.depth": Other("peanut", "1"),
    "peanut.act_fn": Other("peanut", "silu"),
    "peanut.scaling": Other("peanut", "2.0"),
    "prefix.num_virtual_tokens": Other("prefix_tuning", "10"),
    "prompt.num_virtual_tokens": Other("prompt_tuning", "10"),
    "sam.share": Other("sam", "0.02"),
    "sam.rows": Other("sam", "4"),
    "sara.share": Other("sara", "0.1"),
    "sara.norm_weight": Other("sara", "0.5"),
    "sara.norm_layers": Other("sara", "14", ("adapter.options.norm_weight=0.5",)),
    "sara.reselect": Other("sara", "0.25"),
    "ssf.shift": Other("ssf", "false"),
    "vera.d_initial": Other("vera", "0.2"),
    "vera.projection_prng_key": Other("vera", "1"),
}
QUICK = ("dylora.frozen", "dylora.restore", "monteclora.dirichlet_prior", "sara.reselect")


def test_every_option_has_another_value():
    kinds = ("tuner", "init", "optimizer")
    found = {name: facts(kind, name) for kind in kinds for name in parts(kind)}
    own = {f"{name}.{key}" for name, of in found.items() for key in of["options"] | of.get("peft_options", {})}
    assert own == OTHERS.keys()


def test_layers_by_number_leave_the_others_out(base, tmp_path):
    words = ("adapter.target_modules=[q_proj]", "adapter.options={layers_to_transform: [1], layers_pattern: layers}")
    trained = adapter_weights(trainer_of("lora", base, tmp_path, *words).model)
    assert len(trained) == 2 and all(".layers.1.self_attn.q_proj." in name for name in trained)


@pytest.fixture(scope="module")
def as_they_are() -> dict[tuple, dict[str, torch.Tensor]]:
    """What comes of runs without the other value, which options of one method share."""
    return {}


@pytest.mark.parametrize("option", mostly_slow(OTHERS, QUICK))
def test_an_option_changes_what_is_trained(option, base, tiny_encoder, tmp_path, as_they_are):
    other, key = OTHERS[option], option.partition(".")[2]

    def trained(folder: Path, *words: str) -> dict[str, torch.Tensor]:
        make, model = (nlu_trainer_of, tiny_encoder) if other.method == "nmtune" else (trainer_of, base)
        steps = {} if other.steps is None else {"max_steps": other.steps}
        trainer = make(other.method, model, folder, *other.beside, *words, **steps)
        trainer.train()
        return adapter_weights(trainer.model)

    same = (other.method, other.beside, other.steps)
    if same not in as_they_are:
        as_they_are[same] = trained(tmp_path / "as_it_is")
    assert not equal(trained(tmp_path / "other", f"adapter.options.{key}={other.value}"), as_they_are[same])


def test_a_default_changes_with_the_version_of_its_part_only(root):
    """What was trained with another default is another run: raise `version`, and write the file anew."""
    found = {}
    for kind in ("tuner", "init", "optimizer"):
        for name in parts(kind):
            known = facts(kind, name)
            options = {**known.get("options", {}), **known.get("peft_options", {})}
            defaults = {option: default for option, (default, _) in sorted(options.items())}
            if defaults:
                found[f"{kind} {name}"] = {"version": known["version"], "defaults": defaults}
    assert found == json.loads((root / "tests" / "golden" / "option_defaults.json").read_text())


def test_the_version_of_a_part_is_in_the_runs_id(monkeypatch):
    config = load_config("toy", method="dylora")
    before = training_hash(config)
    newer = {**facts("tuner", "dylora"), "version": 2}
    monkeypatch.setattr(
        "ba_lora.config.methods.facts", lambda kind, name: newer if name == "dylora" else facts(kind, name)
    )
    assert training_hash(config) != before
    assert training_settings(config)["adapter"]["versions"] == {"tuner": 2}
    assert "versions" not in training_settings(load_config("toy", method="lora"))["adapter"]
