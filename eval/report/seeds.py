"""What the seed of a run moves: two methods may be compared seed by seed only where it moves the same in both."""

from ba_lora.config.methods import init_facts, tuner_facts
from ba_lora.config.schema import LIKELIHOOD, RunConfig
from ba_lora.io import read_object
from ba_lora.paths import resolve_path


def moved_by_seed(config: RunConfig) -> tuple[str, ...]:
    """Return what differs between two runs that differ only in their seed.

    Neither does the seed choose training rows (data.sample_seed and data.split_seed do), nor does it enter PiSSA's SVD,
    whose sketch has a seed of its own.
    """
    adapter = config.adapter
    moved = ["order of the rows"]
    tuner, init = tuner_facts(adapter), init_facts(adapter)
    if init.get("draws"):
        moved.append(init["draws"])
    elif tuner["draws"] and not init:
        moved.append(tuner["draws"])
    if tuner["draws_in_training"]:
        moved.append(tuner["draws_in_training"])
    if config.kind == "nlu":
        moved += [*([] if _brings_head(config) else ["initialisation of the head"]), "dropout of the encoder"]
    if adapter.dropout and not adapter.trains_own_weights:
        moved.append("dropout of the adapter")
    return tuple(moved)


def _brings_head(config: RunConfig) -> bool:
    """Whether a classifier's base has a head already, so that none is drawn: its folder was saved as a classifier's, or
    the run is measured against what its base predicts (eval/likelihood_nlu.py), which takes a head."""
    saved = read_object(resolve_path(config.model.name) / "config.json") or {}
    return LIKELIHOOD in config.eval.tasks or any(
        name.endswith("ForSequenceClassification") for name in saved.get("architectures") or ()
    )
