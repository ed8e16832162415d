"""What a training step costs: BA-LoRA beside stock PiSSA, plain LoRA and the official recipe, in one run.

    python scripts/bench.py --device cpu                      both vocabularies of the default shape, about 15 minutes
    python scripts/bench.py --device cuda --shape llama2-7b   random weights of that shape, on one GPU

Each case lives in a process of its own, and the cases take turns of one step each, so that whatever else the machine
does meets all of them alike. The step time is the median over the repeats, the memory the process's own maximum (resident
on a CPU, allocated on a GPU), and both are given as ratios to stock PiSSA of the same run. One JSON object a case goes to
stdout; with spread, hardware and versions it is appended to results/bench.csv, and results/bench.png shows the run.

A step is what transformers' Trainer does from one optimizer step to the next: rows, forward, backward, clipping, AdamW.

    pissa        Trainer + PEFT as anyone would write them: the floor of what BA-LoRA adds to
    lora         the same without PiSSA's initialisation
    official     the official recipe's arithmetic, written anew from its description: a second full model, the logits of
                 both at all positions, KL and entropy over all of them, torch.svd_lowrank of the logits
    plain        BALoRATrainer (paper2024), loss by way of the logits of the response positions
    fused        the same loss in chunks of positions: the default
"""

import argparse
import csv
import io
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ba_lora.errors import UserError, run_entry_point  # noqa: E402
from ba_lora.io import write_text_atomic  # noqa: E402

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

STOCK = "pissa"
CASES = (STOCK, "lora", "official", "plain", "fused")
PRINTED = (
    "case", "device", "shape", "vocab", "step_s", "tokens_per_s", "peak_mb", "step_ratio", "memory_ratio",
)  # fmt: skip
STORED = (
    *PRINTED, "floor_ratio", "repeats", "step_s_min", "step_s_quartiles", "threads", "hardware", "versions", "commit",
    "dirty", "finished_at",
)  # fmt: skip
OFFICIAL_SKETCH = 6  # columns of torch.svd_lowrank, its own default


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights, and its micro-batch: every row has `length` tokens, the last `response` a label."""

    vocabularies: tuple[int, ...]
    hidden: int
    layers: int
    heads: int
    intermediate: int
    batch: int
    length: int
    response: int
    rank: int
    init: str = "pissa"
    dtype: str = "float32"
    checkpointing: bool = False


SHAPES = {
    "default": Shape((32_000, 128_000), 512, 6, 8, 1376, batch=4, length=256, response=176, rank=64),
    "llama2-7b": Shape(
        (32_000,), 4096, 32, 32, 11008, batch=16, length=512, response=352, rank=128, init="pissa_niter_16",
        dtype="bfloat16", checkpointing=True,
    ),
    "toy": Shape((512,), 64, 2, 2, 96, batch=2, length=32, response=22, rank=4),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if Path("/dev/nvidia0").exists() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="default")
    parser.add_argument("--vocab", type=int, nargs="+", help="vocabularies instead of the shape's own")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated; stock PiSSA is always among them")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps a case")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench.csv")
    options = parser.parse_args()
    cases = list(dict.fromkeys([STOCK, *options.cases.split(",")]))
    if unknown := set(cases) - set(CASES):
        raise UserError(f"--cases: {', '.join(sorted(unknown))} is unknown: choose among {', '.join(CASES)}")
    if options.repeats < 1 or options.warmup < 1:
        raise UserError("--repeats and --warmup must be at least 1")
    for vocabulary in options.vocab or SHAPES[options.shape].vocabularies:
        rows = measure(cases, options.shape, vocabulary, options.device, options.repeats, options.warmup)
        for row in rows:
            print(json.dumps({key: row[key] for key in PRINTED}), flush=True)
        append(options.results, rows)
        plot(options.results)


# ---- taking turns ----


def measure(
    cases: list[str], shape_name: str, vocabulary: int, device: str, repeats: int, warmup: int
) -> list[dict[str, Any]]:
    """Run the cases side by side, each in its own process; return a row of results for each."""
    shape = SHAPES[shape_name]
    context = multiprocessing.get_context("spawn")  # this process stays small: a child's peak begins with its parent's
    workers: dict[str, tuple[Any, Connection]] = {}
    try:
        for case in cases:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(case, shape, vocabulary, device, theirs), daemon=True)
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
            print(f"\r{shape_name}, V = {vocabulary}: turn {turn + 1} of {warmup + repeats}", end="", file=sys.stderr)
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

    def row(case: str) -> dict[str, Any]:
        step_s, stock_s = statistics.median(seconds[case]), statistics.median(seconds[STOCK])
        report, stock = reports[case], reports[STOCK]
        low, _, high = statistics.quantiles(seconds[case], n=4) if repeats > 1 else (step_s,) * 3
        return {
            "case": case,
            "device": device,
            "shape": shape_name,
            "vocab": vocabulary,
            "step_s": round(step_s, 4),
            "tokens_per_s": round(report["tokens"] / step_s, 1),
            "peak_mb": round(report["peak_mb"], 1),
            "step_ratio": round(step_s / stock_s, 4),
            "memory_ratio": round(report["peak_mb"] / stock["peak_mb"], 4),
            "floor_ratio": round(operations(case, shape, vocabulary) / operations(STOCK, shape, vocabulary), 4),
            "repeats": repeats,
            "step_s_min": round(min(seconds[case]), 4),
            "step_s_quartiles": f"{low:.4f} {high:.4f}",
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
            "or give it more memory"
        ) from error


def work(case: str, shape: Shape, vocabulary: int, device: str, connection: Connection) -> None:
    """Be one case: build it, then take one step whenever told to, and report the peak at the end."""
    from transformers import TrainerCallback

    from ba_lora.results import environment, now, peak_memory_mb, reset_peak_memory

    class Turns(TrainerCallback):
        """Waits between the steps; the clock runs from one wait to the next."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            reset_peak_memory()
            connection.send("ready")
            self.wait(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _finish_queued_work(device)
            connection.send(time.perf_counter() - self.started)
            self.wait(control)

        def wait(self, control: Any) -> None:
            control.should_training_stop = connection.recv() == "end"
            self.started = time.perf_counter()

    trainer = build_trainer(case, shape, vocabulary, device)
    trainer.add_callback(Turns())
    trainer.train()
    facts = environment()
    hardware = facts["hardware"]
    connection.send(
        {
            "tokens": shape.batch * shape.length,
            "peak_mb": peak_memory_mb(),
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


def _finish_queued_work(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


# ---- the cases ----


def build_trainer(case: str, shape: Shape, vocabulary: int, device: str) -> "Trainer":
    """Return the case's trainer on endless random rows."""
    import tempfile

    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments, set_seed

    from ba_lora.config import BALoRAConfig, LossConfig
    from ba_lora.trainer import BALoRATrainer

    set_seed(0)
    model = random_llama(shape, vocabulary, device)
    pretrained = random_llama(shape, vocabulary, device).requires_grad_(False) if case == "official" else None
    init = True if case == "lora" else shape.init
    model = get_peft_model(
        model,
        LoraConfig(
            r=shape.rank,
            lora_alpha=shape.rank,
            target_modules="all-linear",
            init_lora_weights=init,
            task_type="CAUSAL_LM",
        ),
    )
    if shape.checkpointing:
        model.enable_input_require_grads()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, vocabulary, (4 * shape.batch, shape.length), generator=generator)
    labels = rows.clone()
    labels[:, : shape.length - shape.response] = -100
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": labels.tolist()}).with_format("torch")
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="ba-lora-bench-"),
        per_device_train_batch_size=shape.batch,
        max_steps=1_000_000,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        bf16=shape.dtype == "bfloat16",
        gradient_checkpointing=shape.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if shape.checkpointing else None,
        dataloader_pin_memory=device == "cuda",
    )
    if case in ("pissa", "lora"):
        return Trainer(model, arguments, train_dataset=data)
    if case == "official":
        return _official_trainer(pretrained)(model, arguments, train_dataset=data)
    return BALoRATrainer(
        model, arguments, regularizers=BALoRAConfig(), loss=LossConfig(implementation=case), train_dataset=data
    )


def random_llama(shape: Shape, vocabulary: int, device: str) -> "torch.nn.Module":
    """Return a Llama of random weights, the same at every call, made in its dtype on its device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=2 * shape.length,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def _official_trainer(pretrained: "torch.nn.Module") -> type["Trainer"]:
    """Return a Trainer with the official recipe's loss: what it computes and holds, not its mistakes in doing so."""
    import torch
    import torch.nn.functional as F
    from transformers import Trainer

    from ba_lora.config import BALoRAConfig

    weights = BALoRAConfig()

    class OfficialTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **settings: Any) -> Any:
            outputs = model(**inputs)
            with torch.no_grad():
                reference_BTV = pretrained(input_ids=inputs["input_ids"]).logits
            log_p_BTV = F.log_softmax(outputs.logits, dim=-1)
            divergence = F.kl_div(log_p_BTV, F.softmax(reference_BTV, dim=-1), reduction="batchmean")
            negative_entropy = (log_p_BTV.exp() * log_p_BTV).sum(-1).mean()
            _, sigma, _ = torch.svd_lowrank(outputs.logits.flatten(0, 1).float(), q=OFFICIAL_SKETCH)
            ratio = -sigma[: weights.svd_top_k].sum() / sigma.sum()
            loss = outputs.loss + weights.lambda_consistency * divergence
            loss = loss + weights.lambda_diversity * negative_entropy + weights.lambda_svd * ratio
            return (loss, outputs) if return_outputs else loss

    return OfficialTrainer


def operations(case: str, shape: Shape, vocabulary: int) -> float:
    """Return the multiply-adds of a step's matrix products: what no implementation of the case can leave out.

    Attention's own products, normalisation, softmax and the optimizer are left out on both sides of the ratio. A frozen
    matrix costs one product forward and one backward, a factor of the adapter two backward; gradient checkpointing one
    forward more. Stock PiSSA has logits at every position, we at those of M.
    """
    tokens, positions = shape.batch * shape.length, shape.batch * shape.response
    width, inner = shape.hidden, shape.intermediate
    linears = [(width, width)] * 4 + [(width, inner)] * 3
    frozen = shape.layers * sum(i * o for i, o in linears)
    factors = shape.layers * sum(shape.rank * (i + o) for i, o in linears)
    head = width * vocabulary
    forward = tokens * (frozen + factors)
    step = forward * (2 if shape.checkpointing else 1) + tokens * (frozen + 2 * factors)
    if case in ("pissa", "lora"):
        return step + 2 * tokens * head
    if case == "official":
        return step + tokens * frozen + 3 * tokens * head
    return step + forward + 3 * positions * head


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
        newest = {(row["device"], row["shape"], int(row["vocab"]), row["case"]): row for row in csv.DictReader(file)}
    groups = list(dict.fromkeys(key[:3] for key in newest))
    figure, axes = pyplot.subplots(len(groups), 2, figsize=(10, 2.6 * len(groups)), squeeze=False)
    for (device, shape, vocabulary), pair in zip(groups, axes, strict=True):
        rows = [row for key, row in newest.items() if key[:3] == (device, shape, vocabulary)]
        for axis, column, title in zip(pair, ("step_ratio", "memory_ratio"), ("step time", "peak memory"), strict=True):
            bars = axis.barh([row["case"] for row in rows], [float(row[column]) for row in rows], color="#4878a8")
            axis.bar_label(bars, fmt="%.2f", padding=2)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.set_title(f"{title} ÷ stock PiSSA ({device}, {shape}, V = {vocabulary:,})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    run_entry_point(main)
