"""A training that is told to stop (USR1, by a cluster before a time limit) saves a checkpoint and ends in order."""

import signal
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STOPPED = 75  # the exit status: nothing is wrong, the same command goes on (EX_TEMPFAIL)


class StopOnSignal(TrainerCallback):
    """After USR1 the step that runs is the last: its checkpoint is saved, and `stopped` is set.

    The signal reaches the processes of a training at different times, so they agree after each step.
    """

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False

    def listen(self) -> None:
        """Take USR1 from now on; before the trainer is there it is remembered."""
        signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        asked = self._agreed()
        if args.save_strategy == "best" and control.should_evaluate:
            return control  # the evaluation decides whether this step is saved: the next one is the last
        if asked and state.global_step < state.max_steps and not control.should_training_stop:
            control.should_save = control.should_training_stop = self.stopped = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> TrainerControl:
        """Trainer ends an epoch that was left in its middle, too: what belongs to its end comes when it is over."""
        if self.stopped and abs(state.epoch - round(state.epoch)) > 1e-6:
            control.should_evaluate = control.should_save = control.should_log = False
        return control

    def _agreed(self) -> bool:
        """Return whether any process was asked. All processes call it."""
        process = PartialState()
        if process.num_processes == 1:
            return self.asked
        asked = torch.tensor(int(self.asked), device=process.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked)
