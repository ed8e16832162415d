"""What the seed moves in a method's runs, as the report tells it."""

import pytest

from ba_lora.config.layers import load_config
from ba_lora.models.classifier import load_classifier
from eval.report.seeds import moved_by_seed
from tests.support.tiny_nlu import nlu_config

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


def test_a_head_is_moved_only_where_it_is_drawn(tiny_encoder, tmp_path):
    """Not where the base was saved with one, nor where a run is measured against its base's own predictions."""
    drawn = nlu_config(tiny_encoder, "seed=1", method="full_ft")
    rest = ("order of the rows", "dropout of the encoder")
    assert moved_by_seed(drawn) == ("order of the rows", "initialisation of the head", "dropout of the encoder")
    load_classifier(drawn).save_pretrained(tmp_path)
    assert moved_by_seed(nlu_config(tmp_path, "seed=1", method="full_ft")) == rest
    gone = nlu_config("outputs/no_such_base", "eval.tasks=[likelihood]", "eval.data.likelihood=x", method="full_ft")
    assert moved_by_seed(gone) == rest
