"""What the seed of a run moves: two methods may be compared seed by seed only where it moves the same in both."""

from ba_lora.config.schema import RunConfig


def moved_by_seed(config: RunConfig) -> tuple[str, ...]:
    """Return what differs between two runs that differ only in their seed.

    Neither does the seed choose training rows (data.sample_seed and data.split_seed do), nor does it enter PiSSA's SVD,
    whose sketch has a seed of its own.
    """
    adapter = config.adapter
    moved = ["order of the rows"]
    if adapter.init == "corda":
        moved.append("rows of CorDA's covariances")
    elif adapter.tuner in ("adalora", "loha") or (adapter.tuner == "lora" and adapter.init == "lora"):
        moved.append("initialisation of the adapter")
    if config.kind == "nlu":
        moved += ["initialisation of the head", "dropout of the encoder"]
    if adapter.dropout and adapter.tuner not in ("full", "bitfit"):
        moved.append("dropout of the adapter")
    return tuple(moved)
