"""Training's log: a progress bar, the loss terms of each logging step on one line, real tokens per second."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import ProgressCallback

from ba_lora.config.registries import method_terms
from ba_lora.objective.terms import term_names

OFF = "off"  # what the log says of a term that was taken out of the loss
TERMS = ("task", *term_names(), *method_terms())  # in the log's order
LOGGED_NAMES = (  # what a training may log of each logging step; the task's loss has no weight
    "loss", "grad_norm", "learning_rate", "tokens_per_second", "padding_share", *TERMS,
    *(f"{kind}_{term}" for kind in ("weighted", "share", "gradient_share", "lambda", "skipped") for term in TERMS[1:]),
)  # fmt: skip


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

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.show_bar:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            line = terms_line(logs, step=state.global_step, num_steps=state.max_steps)
        elif "eval_loss" in logs:
            line = evaluation_line(logs, step=state.global_step, num_steps=state.max_steps)
        else:
            return
        if self.show_bar and self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


def terms_line(logs: dict[str, float], *, step: int, num_steps: int) -> str:
    """Return `step 20/188 | loss 1.234 | task 1.230 | consistency 0.0123 (0.4 % of the loss) | … | lr 9.1e-04`.

    A term's share is |its weighted value| of the sum over all terms, the task's included; its gradient is compared at
    the hidden states.
    """
    parts = [f"step {step}/{num_steps}", f"loss {logs['loss']:.4f}"]
    others = [name.removeprefix("share_") for name in logs if name.startswith("share_")]
    for term in dict.fromkeys((*TERMS, *others)):
        if term in logs:
            share = f" ({100 * logs[f'share_{term}']:.2g} % of the loss" if f"share_{term}" in logs else ""
            if share and f"gradient_share_{term}" in logs:
                share += f", gradient {100 * logs[f'gradient_share_{term}']:.2g} % of the task's"
            share += ")" if share else ""
            value = logs[term] if isinstance(logs[term], str) else f"{logs[term]:.4g}"
            parts.append(f"{term} {value}{share}")
    if "tokens_per_second" in logs:
        padding = f", {100 * logs['padding_share']:.2g} % padding" if logs["padding_share"] else ""
        parts.append(f"{logs['tokens_per_second']:.0f} tokens/s{padding}")
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.1e}")
    return " | ".join(parts)


def mean_gradient_shares(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return each term's gradient share, the mean over a training's log; {} where none was measured."""
    prefix = "gradient_share_"
    names = dict.fromkeys(name for entry in history for name in entry if name.startswith(prefix))
    return {
        name.removeprefix(prefix): statistics.fmean(entry[name] for entry in history if name in entry) for name in names
    }


def evaluation_line(logs: dict[str, float], *, step: int, num_steps: int) -> str:
    """Return `step 20/188 | held-out rows: loss 1.234 | task 1.230`, of what an evaluation logs of its losses."""
    names = ("loss", *TERMS)
    found = [f"{name} {logs[f'eval_{name}']:.4f}" for name in names if f"eval_{name}" in logs]
    return f"step {step}/{num_steps} | held-out rows: {' | '.join(found)}"


class TermMeter:
    """The loss terms since the last log, averaged over optimizer steps; sums stay on the device until they are read."""

    def __init__(self, terms: Sequence[str]) -> None:
        self.terms = tuple(terms)
        self._names = [f"{kind}{term}" for kind in ("", "weighted_", "skipped_") for term in self.terms]
        self._steps = 0.0
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], *, steps: float) -> None:
        """Add a micro-batch, `steps` of an optimizer step: of each term its share of the step's value over all
        processes and, as weighted_TERM, that times λ(t); a term that could not be taken of it is left out."""
        some = next(iter(values.values()))
        values = {**values, **{f"skipped_{term}": torch.ones_like(some) for term in self.terms if term not in values}}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()
        self._steps += steps

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return what the log says of the terms and begin again; {} without a micro-batch.

        `reduce` sums over the processes, which all call. They need not have met the same terms: one that no covariance
        could be taken for has no diversity. `skipped_TERM` counts the micro-batches without a term.
        """
        if not self._steps:
            return {}
        some = next(iter(self.sums.values()))
        sums = torch.stack([self.sums.get(name, torch.zeros_like(some)) for name in self._names])
        present = torch.tensor([float(name in self.sums) for name in self._names], device=some.device).double()
        sums, present = reduce(torch.stack([sums, present])).tolist()
        met = {name: total for name, total, number in zip(self._names, sums, present, strict=True) if number}
        skipped = {name: int(met.pop(name)) for name in list(met) if name.startswith("skipped_")}
        averages = {name: total / self._steps for name, total in met.items()}
        self.sums, self._steps = {}, 0.0
        terms = [term for term in self.terms if term in averages]
        whole = sum(abs(averages[f"weighted_{term}"]) for term in terms)
        logs = {term: averages[term] for term in terms}
        for term in terms:
            if term != "task":  # whose weight is 1
                logs[f"weighted_{term}"] = averages[f"weighted_{term}"]
                logs[f"share_{term}"] = abs(averages[f"weighted_{term}"]) / whole if whole else 0.0
        return logs | skipped


class TokenMeter:
    """Real tokens (prompt and response, no padding) per second of training, over all processes.

    The clock runs from the first micro-batch; loading, logging and saving count. Counts stay on the device until read.
    """

    def __init__(self) -> None:
        self._counts: Tensor | int = 0  # [real, padding] since the last reading
        self._since: float | None = None
        self._totals = [0.0, 0.0]
        self._seconds = 0.0

    @property
    def has_begun(self) -> bool:
        return self._since is not None

    def add(self, inputs: dict[str, Any]) -> None:
        """Count a micro-batch; call it before its forward pass. Without an attention mask every token is real."""
        if self._since is None:
            self._since = time.perf_counter()
        tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = mask.sum() if mask is not None else torch.tensor(tokens.numel(), device=tokens.device)
        self._counts = self._counts + torch.stack([real, tokens.numel() - real]).double()

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the rates since the last reading and start again; `reduce` sums over the processes, which all call."""
        if not isinstance(self._counts, Tensor):
            return {}
        counts = reduce(self._counts).tolist()  # waits for the device: the time is that of finished work
        now = time.perf_counter()
        seconds = now - self._since
        self._counts, self._since = 0, now
        self._totals = [total + count for total, count in zip(self._totals, counts, strict=True)]
        self._seconds += seconds
        return _rates(counts, seconds)

    def overall(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the rates since the first micro-batch; {} without any. Every process calls it."""
        self.read(reduce)
        return _rates(self._totals, self._seconds) if self._seconds else {}


def _rates(counts: list[float], seconds: float) -> dict[str, float]:
    real, padding = counts
    return {"tokens_per_second": real / seconds, "padding_share": padding / (real + padding)}
