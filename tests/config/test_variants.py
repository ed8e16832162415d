"""The variants in a method's file: some of its terms only, or its terms on another initialisation."""

import pytest

from ba_lora.config.layers import METHODS_PATH, available_methods, load_config, read_yaml
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.config.schema_nlu import NLUConfig

METHODS = {name: read_yaml(METHODS_PATH / f"{name}.yaml") for name in ("ba_lora", "ba_lora_iclr2026")}
VARIANTS = [(method, name) for method, layer in METHODS.items() for name in layer["variants"]]


def test_the_variants_are_methods():
    assert len(VARIANTS) == 19
    assert {name for _, name in VARIANTS} <= set(available_methods("nlg")) & set(available_methods("nlu"))


@pytest.mark.parametrize(("kind", "schema"), [("nlg", NLGConfig), ("nlu", NLUConfig)])
@pytest.mark.parametrize(("method", "name"), VARIANTS)
def test_a_variant_has_its_terms_of_the_method_and_no_other(method, name, kind, schema):
    whole = load_config("toy", method=method, kind=kind)
    part = load_config("toy", method=name, kind=kind)
    settings = METHODS[method]["variants"][name]
    terms = settings.get("terms", ["consistency", "diversity", "svd"])
    assert (
        part.adapter.init == ("lora" if name.startswith(("full_", "lora_", "monteclora_")) else "pissa")
        and part.method == name
    )
    usual = schema().regularizers
    for key, value in vars(part.regularizers).items():
        if key in (
            "lambda_mode",
            "gradient_shares",
            "gradient_every",
            "kl_target",
            "kl_gain",
            "features",
        ):  # of all terms
            continue
        term = next((t for t in ("consistency", "diversity", "svd") if t in key), "consistency")
        if key.startswith("lambda_") and term not in terms:
            assert value == 0
        else:
            assert value == getattr(whole.regularizers if term in terms else usual, key), key
