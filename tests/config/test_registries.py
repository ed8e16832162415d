"""Each list of names stands once; the configuration reads its keys, which are those of the code."""

import pytest

from ba_lora.config import registries
from ba_lora.config.layers import load_config
from ba_lora.config.schema import BALoRAConfig
from ba_lora.errors import UserError


def test_the_names_are_those_of_the_code():
    from ba_lora.methods.base import find_part
    from ba_lora.objective.schedules import SCHEDULES
    from data.sets import named_set
    from eval.tasks import TASKS

    assert registries.schedules() == tuple(SCHEDULES)
    for kind, names in (("tuner", registries.tuners()), ("init", registries.inits()[1:])):
        assert names
        for name in names:
            part = find_part(kind, name)
            assert registries.facts(kind, name) == {key: getattr(part, key) for key in registries.facts(kind, name)}, (
                "the facts that are read from the text are those of the class"
            )
    assert [named_set(name).name for name in registries.data_sets()] == [*registries.data_sets()]
    assert registries.tasks() == tuple(TASKS)
    assert registries.judged_tasks() == tuple(name for name, task in TASKS.items() if task.judged)


def test_whether_a_base_is_a_residual_is_a_fact_of_the_init():
    from types import SimpleNamespace

    from ba_lora.models.layers import has_residual_base

    assert set(registries.residual_inits()) >= {"pissa", "corda", "olora", "lora_ga", "milora"}
    assert not set(registries.residual_inits()) & {"lora", "eva", "loftq"}
    for name in registries.inits():
        residual = name != "lora" and registries.facts("init", name)["residual"]
        assert has_residual_base(SimpleNamespace(init_lora_weights=name)) == residual
    assert has_residual_base(SimpleNamespace(init_lora_weights="pissa_niter_16"))
    for plain in (True, False, "gaussian", "orthogonal", None):  # PEFT's
        assert not has_residual_base(SimpleNamespace(init_lora_weights=plain))


@pytest.mark.parametrize(
    ("word", "known"),
    [
        ("regularizers.svd_schedule=two_phases", "two_phase"),
        ("regularizers.svd_schedule=adaptive", "constant"),
        ("regularizers.lambda_mode=gradnorm", "gradient_share"),
        ("adapter.tuner=lohaa", "loha"),
        ("data.name=metamath", "metamathqa"),
        ("eval.tasks=[mtbench]", "mt_bench"),
    ],
)
def test_another_name_is_refused_with_the_known_ones(word, known):
    with pytest.raises(UserError, match=f"choose one of .*{known}"):
        load_config("toy", overrides=[word])
    load_config("toy", overrides=["regularizers.consistency_schedule=adaptive", "regularizers.svd_schedule=two_phase"])


def test_one_new_line_in_the_registry_is_enough(tmp_path, monkeypatch):
    from ba_lora.paths import PROJECT_ROOT

    text = (PROJECT_ROOT / "ba_lora/objective/schedules.py").read_text(encoding="utf-8")
    copy = tmp_path / "ba_lora/objective/schedules.py"
    copy.parent.mkdir(parents=True)
    copy.write_text(text.replace("SCHEDULES = {", 'SCHEDULES = {\n    "halved": constant,'), encoding="utf-8")
    monkeypatch.setattr(registries, "PROJECT_ROOT", tmp_path)
    registries._entries.cache_clear()
    try:
        assert BALoRAConfig(svd_schedule="halved").svd_schedule == "halved"
    finally:
        registries._entries.cache_clear()
