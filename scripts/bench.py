"""What a training step costs: BA-LoRA beside stock PiSSA, plain LoRA and the official recipe, in one run.

    python scripts/bench.py --device cpu                      both vocabularies of the default shape, about 20 minutes
    python scripts/bench.py --device cuda --shape default-bf16    in 16 bits, as a GPU trains
    python scripts/bench.py --device cuda --shape llama2-7b   random weights of that shape, on one GPU
    python scripts/bench.py --device cpu --shape minilm-nlu   a classifier, under the NLU loss

Each case (scripts/bench_cases.py, bench_nlu.py) lives in a process of its own, and the cases take turns of one step
each, so that whatever else the machine does meets all of them alike. The step time is the median over the repeats, the
memory the process's own maximum (resident on a CPU, allocated on a GPU). Both are given as ratios to stock PiSSA of the
same turns (`step_ratio`, `memory_ratio`) and to the fastest PiSSA among them (`best_step_ratio`, `best_memory_ratio`):
stock PiSSA makes logits at every position, which a careful user avoids. One JSON object a case goes to stdout; with
spread, hardware and versions it is appended to results/bench.csv, and results/bench.png shows the newest row of each
case.

Cases that take turns hold their weights at once. On a CPU all of them do; on a GPU, where a 7B case needs 19 GB before
activations and `official` 32, one case and the PiSSAs at a time (--together changes either). Every group has PiSSAs of
its own, stock PiSSA and the others that are among the cases; their rows stand before those of the group's cases and are
the base of their ratios: two cases of different groups are compared by these ratios only. On a GPU a step begins with
an empty allocator cache, in every case alike: what a process kept for its next step would be missing in the other's.

A step is what transformers' Trainer does from one optimizer step to the next: rows, forward, backward, clipping, AdamW.
`floor_ratio` and `best_floor_ratio` are these ratios by operation counts only: of the matrix products that no
implementation of the case can leave out. A measured ratio can lie below it, since stock PiSSA also pays for passes over
all logits.
"""

import argparse
import csv
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ba_lora.errors import CommandParser, UserError, run_entry_point  # noqa: E402
from ba_lora.io import write_text_atomic  # noqa: E402
from scripts import bench_cases, bench_nlu  # noqa: E402

STOCK = "pissa"
SHAPES = bench_cases.SHAPES | bench_nlu.SHAPES

PRINTED = (
    "case", "device", "shape", "vocab", "step_s", "tokens_per_s", "peak_mb", "step_ratio", "memory_ratio",
    "best_step_ratio", "best_memory_ratio",
)  # fmt: skip
STORED = (
    *PRINTED, "floor_ratio", "best_floor_ratio", "repeats", "step_s_min", "step_s_quartiles", "attention", "threads",
    "hardware", "versions", "commit", "dirty", "finished_at",
)  # fmt: skip


def main() -> None:
    parser = CommandParser(
        prog="python scripts/bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if Path("/dev/nvidia0").exists() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="default")
    parser.add_argument("--vocab", type=int, nargs="+", help="vocabularies instead of the shape's own")
    parser.add_argument("--cases", help="comma-separated, instead of the shape's own; stock PiSSA is always there")
    parser.add_argument(
        "--together", type=int, help="cases beside the PiSSAs at a time (default: 1 on cuda, all on cpu)"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed steps a case")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench.csv")
    options = parser.parse_args()
    known, shape = kind(options.shape).CASES, SHAPES[options.shape]
    dtype = getattr(shape, "dtype", "float32")  # a classifier's shape has no other
    cases = list(dict.fromkeys(options.cases.split(",") if options.cases else shape.cases))
    if unknown := set(cases) - set(known):
        raise UserError(f"--cases: {', '.join(sorted(unknown))} is unknown: choose among {', '.join(known)}")
    lacking = {case: why for case in cases if (why := bench_cases.lacks(case, options.device, dtype))}
    for case, why in lacking.items():
        if options.cases:
            raise UserError(f"--cases: {case}: {why}")
        print(f"{case} is left out: {why}", file=sys.stderr)
    cases = [case for case in cases if case not in lacking]
    together = (1 if options.device == "cuda" else len(cases)) if options.together is None else options.together
    if min(options.repeats, options.warmup, together) < 1:
        raise UserError("--repeats, --warmup and --together must be at least 1")
    # One GPU: Trainer would share a step out among several. None: memory and hardware to be reported are the CPU's.
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu if options.device == "cuda" else ""
    settings = {"repeats": options.repeats, "warmup": options.warmup}
    for vocabulary in options.vocab or shape.vocabularies:
        with tempfile.TemporaryDirectory(prefix="ba-lora-bench-") as folder:  # the groups share a reference cache
            for group in grouped(cases, together, kind(options.shape).PISSA):
                rows = measure(group, options.shape, vocabulary, options.device, Path(folder), **settings)
                for row in rows:
                    print(json.dumps({key: row[key] for key in PRINTED}), flush=True)
                append(options.results, rows)
                plot(options.results)


def kind(shape_name: str) -> ModuleType:
    """Return the module that knows the cases of a shape."""
    return bench_nlu if shape_name in bench_nlu.SHAPES else bench_cases


# ---- taking turns ----


def grouped(cases: Sequence[str], together: int, pissa: Sequence[str]) -> list[list[str]]:
    """Return the cases in their order, `together` to a group, each group behind PiSSAs of its own: stock PiSSA, and
    those of `pissa` that are asked for."""
    bases = [case for case in pissa if case == STOCK or case in cases]
    others = [case for case in cases if case not in bases]
    return [[*bases, *others[start : start + together]] for start in range(0, max(len(others), 1), together)]


def measure(
    cases: list[str], shape_name: str, vocabulary: int, device: str, folder: Path, *, repeats: int, warmup: int
) -> list[dict[str, Any]]:
    """Run the cases side by side, each in its own process; return a row of results for each.

    `cases` is a group, stock PiSSA among them. In `folder` they keep what they need, and later groups what they share.
    """
    shape, operations = SHAPES[shape_name], kind(shape_name).operations
    context = multiprocessing.get_context("spawn")  # this process stays small: a child's peak begins with its parent's
    workers: dict[str, tuple[Any, Connection]] = {}
    try:
        for case in cases:
            ours, theirs = context.Pipe()
            settings = (case, shape_name, vocabulary, device, folder, theirs)
            if case in kind(shape_name).FILLED_BEFORE:
                filling = context.Process(target=fill, args=settings[:-1])
                filling.start()
                filling.join()
                if filling.exitcode != 0:
                    raise UserError(f"the reference cache could not be filled, the reason is above: leave out {case}")
            process = context.Process(target=work, args=settings, daemon=True)
            process.start()
            theirs.close()
            workers[case] = process, ours
            _receive(case, workers)  # ready: built one after the other
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        for turn in range(warmup + repeats):
            for case in cases if turn % 2 else cases[::-1]:  # nobody always follows the same neighbour
                workers[case][1].send("step")
                elapsed = _receive(case, workers)
                if turn >= warmup:
                    seconds[case].append(elapsed)
            where = f"{shape_name}, V = {vocabulary}, {' '.join(cases)}"
            print(f"\r{where}: turn {turn + 1} of {warmup + repeats}", end="", file=sys.stderr)
        print(file=sys.stderr)
        reports = {}
        for case in cases:
            workers[case][1].send("end")
            reports[case] = _receive(case, workers)
    finally:
        for process, connection in workers.values():
            connection.close()
            process.terminate()
            process.join()

    medians = {case: statistics.median(of_case) for case, of_case in seconds.items()}
    best = min((case for case in kind(shape_name).PISSA if case in cases), key=medians.__getitem__)

    def ratios(prefix: str, case: str, base: str) -> dict[str, float]:
        return {
            f"{prefix}step_ratio": round(medians[case] / medians[base], 4),
            f"{prefix}memory_ratio": round(reports[case]["peak_mb"] / reports[base]["peak_mb"], 4),
            f"{prefix}floor_ratio": round(operations(case, shape, vocabulary) / operations(base, shape, vocabulary), 4),
        }

    def row(case: str) -> dict[str, Any]:
        step_s, report = medians[case], reports[case]
        low, _, high = statistics.quantiles(seconds[case], n=4) if repeats > 1 else (step_s,) * 3
        return {
            "case": case,
            "device": device,
            "shape": shape_name,
            "vocab": vocabulary,
            "step_s": round(step_s, 4),
            "tokens_per_s": round(report["tokens"] / step_s, 1),
            "peak_mb": round(report["peak_mb"], 1),
            **ratios("", case, STOCK),
            **ratios("best_", case, best),
            "repeats": repeats,
            "step_s_min": round(min(seconds[case]), 4),
            "step_s_quartiles": f"{low:.4f} {high:.4f}",
            "attention": report["attention"],
            **report["environment"],
        }

    return [row(case) for case in cases]


def _receive(case: str, workers: dict[str, tuple[Any, Connection]]) -> Any:
    process, connection = workers[case]
    try:
        return connection.recv()
    except EOFError as error:
        process.join()
        raise UserError(
            f"case {case} ended with exit code {process.exitcode}, its own words are above: leave it out with --cases, "
            "or give it more memory (a smaller --together)"
        ) from error


def fill(case: str, shape_name: str, *settings: Any) -> None:
    """Be the process that fills the reference cache."""
    _speak_on_stderr()
    kind(shape_name).fill_cache(case, SHAPES[shape_name], *settings)


def work(case: str, shape_name: str, vocabulary: int, device: str, folder: Path, connection: Connection) -> None:
    """Be one case: build it, then take one step whenever told to, and report the peak at the end."""
    from transformers import TrainerCallback

    from ba_lora.runs.environment import environment, now, peak_memory_mb, reset_peak_memory

    class Turns(TrainerCallback):
        """Waits between the steps; the clock runs from one wait to the next."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _release_unused_memory(device)
            reset_peak_memory()
            connection.send("ready")
            self.wait(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _finish_queued_work(device)
            elapsed = time.perf_counter() - self.started
            _release_unused_memory(device)
            connection.send(elapsed)
            self.wait(control)

        def wait(self, control: Any) -> None:
            control.should_training_stop = connection.recv() == "end"
            self.started = time.perf_counter()

    _speak_on_stderr()
    shape = SHAPES[shape_name]
    trainer = kind(shape_name).build_trainer(case, shape, vocabulary, device, folder)
    trainer.add_callback(Turns())
    trainer.train()
    facts = environment()
    hardware = facts["hardware"]
    connection.send(
        {
            "tokens": sum(shape.lengths(case)),
            "peak_mb": peak_memory_mb(),
            "attention": trainer.model.config._attn_implementation,
            "environment": {
                "threads": facts["num_threads"],
                "hardware": hardware["gpu"] or f"{hardware['cpu_cores']} x {hardware['cpu']}",
                "versions": " ".join(f"{name}={version}" for name, version in facts["packages"].items()),
                "commit": facts["git"]["commit"],
                "dirty": facts["git"]["dirty"],
                "finished_at": now(),
            },
        }
    )


def _speak_on_stderr() -> None:
    """Whatever this process and its libraries print: stdout is for the results."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def _finish_queued_work(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _release_unused_memory(device: str) -> None:
    """Give back what the allocator keeps for later: on a GPU it would be missing in the processes whose turn it is."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


# ---- results ----


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append the rows to the CSV, which is made where it does not exist."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, STORED, lineterminator="\n")
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not earlier:
        writer.writeheader()
    elif earlier.splitlines()[0] != ",".join(STORED):
        raise UserError(f"{path} has other columns than this version writes: give --results another file")
    writer.writerows(rows)
    write_text_atomic(path, earlier + buffer.getvalue())


def plot(path: Path) -> None:
    """Draw the newest row of each case beside the CSV: step time and peak memory as ratios to stock PiSSA."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(path, encoding="utf-8", newline="") as file:
        newest: dict[tuple[str, str, int, str], dict[str, str]] = {}
        for row in csv.DictReader(file):
            key = row["device"], row["shape"], int(row["vocab"]), row["case"]
            newest.pop(key, None)  # so that the order, too, is that of the newest run
            newest[key] = row
    groups = list(dict.fromkeys(key[:3] for key in newest))
    figure, axes = pyplot.subplots(len(groups), 2, figsize=(10, 2.6 * len(groups)), squeeze=False)
    for (device, shape, vocabulary), pair in zip(groups, axes, strict=True):
        rows = [row for key, row in newest.items() if key[:3] == (device, shape, vocabulary)]
        rows.sort(key=lambda row: row["case"] != STOCK)  # the last group's would stand before its cases
        for axis, column, title in zip(pair, ("step_ratio", "memory_ratio"), ("step time", "peak memory"), strict=True):
            bars = axis.barh([row["case"] for row in rows], [float(row[column]) for row in rows], color="#4878a8")
            background = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # where a label meets the line at 1
            axis.bar_label(bars, fmt="%.2f", padding=3, bbox=background, zorder=3)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.set_title(f"{title} ÷ stock PiSSA ({device}, {shape}, V = {vocabulary:,})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    run_entry_point(main)
