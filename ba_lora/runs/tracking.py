"""Tracked runs: trainer.report_to=tensorboard | trackio | wandb, one tracked run under the run's id.

transformers' own callbacks report what the Trainer logs. `Tracking` stands before them and adds what they lack: the
run's id and config, the memory, and that a resumed run goes on where it was. `track_scores` adds the scores of an
evaluation, which are made after the training by another process. Nothing leaves the machine unless the environment or
trainer.trackio_space_id asks for it.

TensorBoard's files lie in the run's folder, or in one of its name where TENSORBOARD_LOGGING_DIR says; W&B's in its
wandb/, Trackio's where TRACKIO_DIR says.
"""

import contextlib
import dataclasses
import glob
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ba_lora.config.schema import RunConfig, public, to_yaml
from ba_lora.config.trainer import PROJECT, reporters
from ba_lora.runs.environment import peak_memory_mb

if TYPE_CHECKING:
    from transformers import Trainer


class Tracking(TrainerCallback):
    """Opens the tracked run for the callbacks of report_to, and adds config and memory."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def put_before_reporters(self, trainer: "Trainer") -> None:
        """Stand first among the trainer's callbacks, whose order is that of their calls."""
        self.callbacks = trainer.callback_handler.callbacks
        self.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for callback in list(self.callbacks):
            name = type(callback).__name__.removesuffix("Callback").lower()
            if name in _OPEN:
                _OPEN[name](self.config, callback, args, state, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if (
            logs and "loss" in logs
        ):  # the callbacks after this one are given the same mapping; the run's log has its own
            logs["peak_memory_mb"] = round(peak_memory_mb(), 1)


def _plain(config: RunConfig) -> dict[str, Any]:
    return public(dataclasses.asdict(config))


def _tensorboard_folder(run_path: Path) -> Path:
    chosen = os.environ.get("TENSORBOARD_LOGGING_DIR")
    return Path(chosen) / f"{run_path.name}-{_folder(run_path)}" if chosen else run_path


def _open_tensorboard(config: RunConfig, callback: Any, args: Any, state: Any, model: Any) -> None:
    from torch.utils.tensorboard import SummaryWriter

    folder = _tensorboard_folder(config.run_path)
    callback.logging_dir = str(folder)
    # What was logged after the checkpoint that a resumed run starts from is logged again, and hidden where it was.
    resumed = {"purge_step": state.global_step + 1} if state.global_step else {}
    if not resumed:
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
    callback.tb_writer = SummaryWriter(callback.logging_dir, **resumed)
    callback.tb_writer.add_text("config", f"```yaml\n{to_yaml(config, for_others=True)}```", state.global_step)


def _open_trackio(config: RunConfig, callback: Any, args: Any, state: Any, model: Any) -> None:
    import trackio

    if not state.global_step:  # begun again, and not a second run of the name
        for run in _runs_in_trackio(args.project, args.run_name):
            if (run.config or {}).get("folder") == _folder(config.run_path):  # and not another folder's of the same id
                run.delete()
    callback.setup(args, state, model)
    trackio.config.update({"run": _plain(config), "folder": _folder(config.run_path)})


def _folder(path: Path) -> str:
    """Return what tells a run's folder from others, and not where it is."""
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]


def _runs_in_trackio(project: str, name: str) -> list[Any]:
    """Return the tracked runs of that name on this machine."""
    import trackio

    try:
        return [run for run in trackio.Api().runs(project) if run.name == name]
    except ValueError:  # no such project yet
        return []


def _open_wandb(config: RunConfig, callback: Any, args: Any, state: Any, model: Any) -> None:
    import wandb

    if not state.global_step:  # begun again: a sync would put both into the one run of the name
        for folder in (config.run_path / "wandb").glob(f"offline-run-*-{glob.escape(args.run_name)}"):
            shutil.rmtree(folder)
    _init_wandb(config.run_path, args.run_name, args.project, resume="allow" if state.global_step else None)
    callback.setup(args, state, model)
    wandb.config.update({"run": _plain(config)}, allow_val_change=True)


def _init_wandb(run_path: Path, name: str, project: str, *, resume: str | None) -> Any:
    import wandb

    os.environ.setdefault("WANDB_MODE", "offline")
    project = os.environ.get("WANDB_PROJECT", project)
    return wandb.init(project=project, id=name, name=name, resume=resume, dir=str(run_path))


_OPEN = {"tensorboard": _open_tensorboard, "trackio": _open_trackio, "wandb": _open_wandb}


def track_scores(run_path: Path, result: dict[str, Any]) -> None:
    """Add the scores of a run's result to its tracked run as eval/TASK/METRIC, at the training's last step.

    A tracker that fails, or is not installed where the scores are made, is told on stderr: the scores stand in the
    result anyway.
    """
    trainer = result["config"]["trainer"]
    step = (result.get("training") or {}).get("steps")
    scores = {
        f"eval/{task}/{name}": value
        for task, score in result["evaluation"].items()
        for name, value in score["metrics"].items()
        if isinstance(value, int | float)
    }
    if step is None or not scores:
        return
    for name in reporters(trainer):
        if name in _ADD:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # a command's last line on stdout is its own
                    _ADD[name](run_path, result["run_id"], trainer, scores, step)
            except Exception as error:  # of any class, by the tracker
                text = " ".join(str(error).split())
                print(f"{result['run_id']}: its scores are not in {name}: {text}", file=sys.stderr, flush=True)


def _add_to_tensorboard(run_path: Path, run_id: str, trainer: dict, scores: dict[str, float], step: int) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(_tensorboard_folder(run_path))) as writer:
        for name, value in scores.items():
            writer.add_scalar(name, value, step)


def _add_to_trackio(run_path: Path, run_id: str, trainer: dict, scores: dict[str, float], step: int) -> None:
    import trackio

    settings = {"space_id": trainer.get("trackio_space_id"), "bucket_id": trainer.get("trackio_bucket_id")}
    project = trainer.get("project", PROJECT)
    for run in _runs_in_trackio(project, run_id):  # a resumed run without a config would lose its own
        settings["config"] = {key: value for key, value in (run.config or {}).items() if not key.startswith("_")}
    trackio.init(project=project, name=run_id, resume="allow", auto_log_cpu=False, auto_log_gpu=False, **settings)
    try:
        trackio.log(scores | {"train/global_step": step})
    finally:
        trackio.finish()


def _add_to_wandb(run_path: Path, run_id: str, trainer: dict, scores: dict[str, float], step: int) -> None:
    with _init_wandb(run_path, run_id, trainer.get("project", PROJECT), resume="allow") as run:
        run.log(scores | {"train/global_step": step})


_ADD = {"tensorboard": _add_to_tensorboard, "trackio": _add_to_trackio, "wandb": _add_to_wandb}
