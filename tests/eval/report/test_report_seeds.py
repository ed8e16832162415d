"""What the seed moves in a method's runs, as the report tells it."""

import pytest

from ba_lora.config.layers import load_config
from eval.report.seeds import moved_by_seed

ADAPTER = "initialisation of the adapter"


@pytest.mark.parametrize(
    ("method", "overrides", "moved"),
    [
        ("lora", [], (ADAPTER,)),
        ("pissa", [], ()),
        ("eva", [], ("rows of EVA's inputs",)),
        ("vera", [], ()),
        ("dylora", [], (ADAPTER, "rank of each step")),
        ("monteclora", [], (ADAPTER, "noise of each pass")),
        ("monteclora", ["adapter.init=pissa"], ("noise of each pass",)),
        ("sara", [], ("layers of SaRA's norm",)),
        ("sam", [], ("rows of SAM's gradients",)),
    ],
)
def test_what_the_seed_moves(method, overrides, moved):
    config = load_config("toy", method=method, overrides=overrides)
    assert moved_by_seed(config) == ("order of the rows", *moved)
