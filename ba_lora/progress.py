"""Training's log: a progress bar, and the loss terms of each logging step on one line."""

from typing import Any

from transformers.trainer_callback import ProgressCallback

TERMS = ("task", "consistency", "diversity", "svd")


class TermsCallback(ProgressCallback):
    """A progress bar, and every log as one line: step, loss, each term with its share of the total, learning rate."""

    def __init__(self, *, show_bar: bool = True) -> None:
        super().__init__()
        self.show_bar = show_bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.show_bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.show_bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.show_bar:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        line = terms_line(logs, step=state.global_step, num_steps=state.max_steps)
        if self.show_bar and self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


def terms_line(logs: dict[str, float], *, step: int, num_steps: int) -> str:
    """Return `step 20/188 | loss 1.234 | task 1.230 | consistency 0.0123 (0.4 %) | … | lr 9.1e-04`."""
    parts = [f"step {step}/{num_steps}", f"loss {logs['loss']:.4f}"]
    for term in TERMS:
        if term in logs:
            share = f" ({100 * logs[f'share_{term}']:.2g} %)" if f"share_{term}" in logs else ""
            parts.append(f"{term} {logs[term]:.4g}{share}")
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}")
    return " | ".join(parts)
