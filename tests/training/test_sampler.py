"""The order of the training rows by length: the same for any number of processes, and again after a resumption."""

import pytest
from accelerate import skip_first_batches

from tests.support.tiny import tiny_peft, tiny_rows
from tests.training.test_trainer import trainer


@pytest.fixture
def loaders(tmp_path, monkeypatch):
    """Return a function that gives each process's loader of `num_processes` that train together."""

    def built(num_processes, **settings):
        settings |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
        run = trainer(tiny_peft(True), tmp_path, rows=tiny_rows(40), **settings)
        run.data_collator = lambda rows: {"rows": [row["row"] for row in rows]}
        monkeypatch.setattr(type(run.args), "world_size", num_processes)
        found = []
        for index in range(num_processes):
            monkeypatch.setattr(type(run.accelerator), "num_processes", num_processes)
            monkeypatch.setattr(type(run.accelerator), "process_index", index)
            found.append(run.get_train_dataloader())
        return found

    return built


def order(loader, epoch):
    loader.set_epoch(epoch)
    return [batch["rows"] for batch in loader]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_rest_of_a_resumed_epoch_is_that_epochs(loaders, num_processes):
    (loader, *_), (fresh, *_) = loaders(num_processes), loaders(num_processes)
    first, second = order(loader, 0), order(loader, 1)
    assert first != second
    assert order(skip_first_batches(fresh, 3), 1) == second[3:]


def test_effective_batches_do_not_depend_on_the_number_of_processes(loaders):
    (alone,) = loaders(1, gradient_accumulation_steps=2)
    together = loaders(2)
    for epoch in (0, 1):
        batches = order(alone, epoch)
        shared = zip(*(order(loader, epoch) for loader in together), strict=True)
        assert [list(pair) for pair in shared] == [batches[at : at + 2] for at in range(0, len(batches), 2)]
