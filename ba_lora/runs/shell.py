"""What both training scripts have in common: processes, the run's folder, the model, the training, its export.

A script's `train(run)` prepares the data, calls `run.build_model`, makes its objective and its trainer, calls
`run.fit`, and returns what `Trained` holds; all around it stands here.
"""

import contextlib
import gc
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from ba_lora.config.command_line import read_run
from ba_lora.config.schema import RunConfig
from ba_lora.io import finite, write_jsonl_atomic
from ba_lora.methods.build import build_model, parameter_counts, probe_logits
from ba_lora.models.source import hub_commit
from ba_lora.processes import on_main_process, start_processes
from ba_lora.runs.card import write_model_card
from ba_lora.runs.environment import code_state, environment, peak_memory_mb, reset_peak_memory, total_peak_memory_mb
from ba_lora.runs.export import export_run, push_to_hub, save_trained
from ba_lora.runs.folder import (
    claimed_folder,
    complete_result,
    finish_run,
    is_trained,
    keep_base,
    keep_factors,
    recorded,
)
from ba_lora.runs.machines import RunMachine, check_same_rows, meet, watched
from ba_lora.runs.parity import probe_batch, report
from ba_lora.runs.tracking import Tracking
from ba_lora.training.arguments import build_arguments, count_steps
from ba_lora.training.log import mean_gradient_shares
from ba_lora.training.stop import STOPPED, StopOnSignal
from ba_lora.training.trainer import BALoRATrainer
from ba_lora.training.watch import WatchedTraining

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Trained:
    """What a script's `train` hands over. data, training: for the run's record; clean_up: is called after the export,
    before the run counts as finished."""

    trainer: BALoRATrainer
    data: dict[str, Any]
    training: dict[str, Any]
    clean_up: Callable[[], object] = field(default=lambda: None)


class TrainingRun:
    """A run in one of its processes, each of which does the same; `print` speaks on the main process only."""

    def __init__(
        self,
        config: RunConfig,
        process: PartialState,
        arguments: TrainingArguments,
        *,
        machines: list[RunMachine],
        stop: StopOnSignal,
    ) -> None:
        self.config, self.process, self.arguments = config, process, arguments
        self.machines, self.stop = machines, stop
        self.run_path: Path = config.run_path
        self.print = process.print
        if process.is_main_process:
            code_state()  # before the code changes on the disk

    def build_model(self, rows: "Dataset", tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """Return the pre-trained model with the method's adapter, for training on `rows`.

        The logits of two rows, the probe, tell how far step 0 is from the pre-trained model, and later each export
        from the trained one.
        """
        config = self.config
        check_same_rows(self.process, self.machines, rows)
        self.probe = probe_batch(rows.select(range(min(2, len(rows)))).to_list(), tokenizer.pad_token_id)
        self.num_steps = count_steps(self.arguments, len(rows))
        self.model_commit = hub_commit(config.model)  # a branch may move while the run trains
        on_main_process(self.process, keep_base, config, commit=self.model_commit)
        model, self.step0 = build_model(
            config, run_path=self.run_path, num_steps=self.num_steps, probe=self.probe, rows=rows
        )
        on_main_process(self.process, keep_factors, config)
        self.trainable, self.everything = parameter_counts(model)
        self.print(
            f"model: {config.model.name}, {self.trainable:,} of {self.everything:,} parameters trained; {self.step0}"
        )
        return model

    def fit(self, trainer: BALoRATrainer) -> None:
        """Train, from the last checkpoint if there is one; leave the process where a signal stopped the training."""
        arguments = self.arguments
        effective = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        self.print(f"training: {self.num_steps} steps of {effective} rows, {arguments.world_size} process(es)")
        if arguments.report_to:
            Tracking(self.config).put_before_reporters(trainer)
        trainer.add_callback(WatchedTraining(self.run_path))
        reset_peak_memory()  # the SVDs of the initialisation are no part of training
        trainer.add_callback(self.stop)
        started = time.perf_counter()
        self._checkpoint = trainer.train_or_resume(self.run_path / "checkpoints", num_steps=self.num_steps)
        self._seconds = time.perf_counter() - started
        if self.stop.stopped:
            step = trainer.state.global_step
            self.process.wait_for_everyone()  # a launcher ends all when one leaves, and the first still writes files
            self.print(f"told to stop (USR1): saved at step {step} of {self.num_steps}; the same command goes on")
            sys.exit(STOPPED)

    def facts(self, trainer: BALoRATrainer) -> dict[str, Any]:
        """Write the log, and return what the record tells of every training. All processes call it."""
        arguments, log, checkpoint = self.arguments, trainer.state.log_history, self._checkpoint
        if self.process.is_main_process:
            write_jsonl_atomic(self.run_path / "log.jsonl", finite(log))
        return {
            "seconds": None if checkpoint else round(self._seconds, 2),  # of an uninterrupted run only
            "resumed_from": checkpoint.name if checkpoint else None,
            **{"tokens_per_second": None, "padding_share": None, **trainer.throughput()},
            "steps": trainer.state.global_step,
            "micro_batch": arguments.per_device_train_batch_size,
            "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
            "num_processes": arguments.world_size,
            "trainable_parameters": self.trainable,
            "total_parameters": self.everything,
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "total_peak_memory_mb": round(total_peak_memory_mb(), 1),
            "step0_max_logit_difference": self.step0.difference,
            "gradient_shares": mean_gradient_shares(log),
            "last_log": next((entry for entry in reversed(log) if "loss" in entry), None),
            "last_evaluation": next((entry for entry in reversed(log) if "eval_task" in entry), None),
        }

    def export(self, trained: Trained) -> None:
        """Save adapter, plain LoRA and merged model, each compared with the trained one, then the run's record."""
        config, run_path, trainer = self.config, self.run_path, trained.trainer
        trained_logits = probe_logits(trainer.plain_model(), self.probe)
        save_trained(trainer, config, run_path)
        trainer.model = trainer.model_wrapped = trained.trainer = None  # room for the exports, which are loaded again
        del trainer
        gc.collect()
        if not self.process.is_main_process:
            return
        parities = export_run(config, run_path, self.probe, trained_logits, initial_logits=self.step0.initial_logits)
        trained.clean_up()
        result = finish_run(
            run_path,
            config,
            {
                "model": {"name": config.model.name, "revision": self.model_commit},
                "data": trained.data,
                "training": finite(trained.training),
                "export": report(parities, config),
                "environment": environment(
                    num_processes=self.process.num_processes, num_gpus=[m.num_gpus for m in self.machines]
                ),
            },
        )
        write_model_card(run_path, config, result)
        compared = ", ".join(f"{name} {parity}" for name, parity in parities.items())
        print(f"exported to {run_path}: largest logit difference to the trained model: {compared}")


def run_training(
    kind: str,
    description: str | None,
    train: Callable[[TrainingRun], Trained],
    *,
    check: Callable[[RunConfig], object] = lambda config: None,
) -> None:
    """Read the command line, train and export the run unless it is trained already, and push it where asked for."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cancelled job is recorded as cancelled
    stop = StopOnSignal()
    stop.listen()
    config = read_run(kind, description)
    check(config)

    process = start_processes(config.trainer)
    machines = meet(process, config)
    arguments = build_arguments(config, config.run_path)  # what this refuses leaves no folder
    run = TrainingRun(config, process, arguments, machines=machines, stop=stop)
    with watched(process, machines), contextlib.ExitStack() as held:
        # One process makes the run's folder and locks it, or refuses it to another config; its error is everybody's.
        on_main_process(process, held.enter_context, claimed_folder(config, num_processes=process.num_processes))
        if is_trained(run.run_path, config):
            on_main_process(process, complete_result, config)
            run.print(f"{run.run_path.name} is trained already (overwrite=true redoes it)")
        else:
            with recorded(run.run_path, config, main=process.is_main_process):
                set_seed(config.seed)
                run.export(train(run))
        if config.hub.push and process.is_main_process:
            print(f"pushed to {push_to_hub(run.run_path, config)}")
