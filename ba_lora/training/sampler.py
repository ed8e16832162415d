"""The order of the training rows where rows of like length go together."""

from collections.abc import Iterator

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Rows of like length together, in an order that a resumed run finds again (Trainer's draws from global state)."""

    def __init__(self, batch_size: int, *, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


def reachable_sampler(loader: DataLoader) -> DataLoader:
    """Return the loader, its sampler where `set_epoch` finds it also after batches have been skipped.

    On several processes accelerate's shard hides the sampler; a resumed training wraps the shard once more, and the
    rest of any epoch would be taken from epoch 0's order.
    """
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard):
        shard.sampler = shard.batch_sampler.sampler
    return loader
