"""The training's side of evaluations.py: it tells its evaluations as it makes them, and stops when it is asked to."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ba_lora.io import append_line, finite
from ba_lora.training.evaluations import EVALUATIONS, STOP


class WatchedTraining(TrainerCallback):
    """Writes the lines, and raises KeyboardInterrupt once the file `stop` is there."""

    def __init__(self, run_path: Path) -> None:
        self._run_path = run_path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        values = {name: value for name, value in (logs or {}).items() if name.startswith("eval_")}
        if values and state.is_world_process_zero:
            path = self._run_path / EVALUATIONS
            append_line(path, finite({"step": state.global_step, "max_steps": state.max_steps, **values}))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and (self._run_path / STOP).exists():
            print(f"stopped at step {state.global_step}: {self._run_path / STOP} asks for it", flush=True)
            raise KeyboardInterrupt
