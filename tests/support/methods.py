"""Every method on one footing: what it is asked for, and a tiny run of it."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft.tuners.lora.monteclora import BufferedMontecloraSampler
from transformers import AutoTokenizer, DataCollatorWithPadding

from ba_lora.config.layers import load_config
from ba_lora.config.methods import optimizer_facts, tuner_facts
from ba_lora.config.schema import BALoRAConfig
from ba_lora.config.schema_nlu import NLURegularizersConfig
from ba_lora.methods.build import build_model
from ba_lora.training.trainer import BALoRATrainer
from tests.support.tiny import adapter_weights, arguments, collate, tiny_llama, tiny_rows
from tests.support.tiny_nlu import classifier_trainer, nlu_config, tiny_pairs

IN = 2 * (32 * 6 + 48)  # of 2 layers: q, k, v, o, gate, up, down
OUT = 2 * (32 * 4 + 48 * 2 + 32)
LAYERS = 14
WEIGHTS = 2 * (4 * 32 * 32 + 3 * 32 * 48)
OFF = BALoRAConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)


@dataclasses.dataclass(frozen=True)
class Case:
    """count: trained parameters at rank r, None where the rows decide. step_zero: the largest |Δ logit| of the
    untrained model, None where it is another one from the start. options: of the run. method: where it is not the
    case's name. noisy_start: the noise of a training pass acts on the untrained model, too."""

    count: Callable[[int], int] | None
    step_zero: float | None = 0.0
    options: tuple[str, ...] = ()
    rank: int = 4
    steps: int = 4
    method: str = ""
    noisy_start: bool = False


def lora(r: int) -> int:
    return r * (IN + OUT)


def monteclora(r: int) -> int:
    return lora(r) + (r + 4) * LAYERS


RESIDUAL = 2e-5
CASES = {
    "full_ft": Case(lambda r: sum(p.numel() for p in tiny_llama().parameters())),
    "lora": Case(lora),
    "rslora": Case(lora),
    "dora": Case(lambda r: lora(r) + OUT, step_zero=1e-6),
    "adalora": Case(lambda r: lora(6) + 6 * LAYERS, steps=12),
    "loha": Case(lambda r: 2 * lora(r)),
    "pissa": Case(lora, RESIDUAL),
    "corda": Case(lora, 2e-4),
    "olora": Case(lora, RESIDUAL),
    "milora": Case(lora, RESIDUAL),
    "lora_ga": Case(lora, RESIDUAL, ("adapter.options.rows=8",)),
    "eva": Case(lora, 0, ("adapter.options={rows: 16, batch_size: 4, rho: 1}",)),
    "lora_plus": Case(lora),
    "lora_fa": Case(lambda r: r * OUT),
    "lora_pro": Case(lora),
    "monteclora": Case(monteclora),
    "dylora": Case(lora),
    "delta_lora": Case(lora, 0, ("adapter.options.start=1",)),
    "vera": Case(lambda r: OUT + r * LAYERS, rank=16),
    "ia3": Case(lambda r: OUT - 2 * 32 + 2 * 48),
    "miss": Case(lambda r: r * OUT),
    "peanut": Case(lambda r: 2 * r * OUT),
    "ssf": Case(lambda r: 2 * OUT),
    "sara": Case(lambda r: round(0.05 * WEIGHTS)),
    "sam": Case(lambda r: round(0.01 * WEIGHTS), 0, ("adapter.options.rows=8",)),
    "lorta": Case(lambda r: r * (32 + 16 + 2 + 2 + 4)),
    "houlsby": Case(lambda r: 4 * (2 * r * 32 + r + 32)),
    "pfeiffer": Case(lambda r: 2 * (2 * r * 32 + r + 32)),
    "prompt_tuning": Case(lambda r: 20 * 32, None),
    "prefix_tuning": Case(lambda r: 20 * 2 * 2 * 32, None),
    "ba_lora": Case(lora, RESIDUAL),
    "ba_lora_iclr2026": Case(lora, RESIDUAL),
    # parts chosen apart
    "eva_of_unequal_ranks": Case(None, 0, ("adapter.options={rows: 16, batch_size: 16, rho: 2}",), method="eva"),
    "lora_fa_on_pissa": Case(lambda r: r * OUT, RESIDUAL, ("adapter.init=pissa",), method="lora_fa"),
    "lora_pro_on_pissa": Case(lora, RESIDUAL, ("adapter.init=pissa",), method="lora_pro"),
    "monteclora_on_pissa": Case(monteclora, RESIDUAL, ("adapter.init=pissa",), method="monteclora", noisy_start=True),
}
ADAPTERS = sorted(CASES.keys() - {"full_ft", "ba_lora", "ba_lora_iclr2026"})
IN_LAYERS = [method for method in ADAPTERS if CASES[method].step_zero is not None]  # no virtual tokens

CLASSIFIERS = {"bitfit": 2 * (4 * 32 + 48 + 3 * 32) + 2 * 32 + 99, "nmtune": 2 * 32 * 32 + 2 * 32 + 99}  # for NLU only


def config_of(method: str, base: Path, *overrides: str):
    case = CASES[method]
    method = case.method or method
    words = [f"model.name={base}", "model.dtype=float32", *case.options, *overrides]
    config = load_config("toy", method=method, overrides=words)
    if "rank" in tuner_facts(config.adapter)["ignores"] or any(word.startswith("adapter.rank=") for word in overrides):
        return config
    return load_config("toy", method=method, overrides=[*words, f"adapter.rank={case.rank}"])


def built(method: str, base: Path, folder: Path, *overrides: str):
    """(config, model ready to train, step zero), from the folder's first factors where there are any."""
    config = config_of(method, base, *overrides)
    torch.manual_seed(1)
    batch = collate(list(tiny_rows(3)))
    probe = {name: batch[name] for name in ("input_ids", "attention_mask")}
    steps = CASES[method].steps
    return config, *build_model(config, run_path=folder, num_steps=steps, probe=probe, rows=tiny_rows(24)), probe


def trainer_of(method: str, base: Path, folder: Path, *overrides: str, regularizers=OFF, **settings):
    config, model, _, _ = built(method, base, folder / "run", *overrides)
    chosen = {"max_steps": CASES[method].steps, "learning_rate": 1e-2} | settings
    return BALoRATrainer(
        model,
        arguments(folder, **chosen),
        regularizers=regularizers,
        train_dataset=tiny_rows(48),
        data_collator=collate,
    )


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@contextlib.contextmanager
def fixed_draws() -> Iterator[None]:
    """Let all passes of MonteCLoRA draw the same numbers, so that ways to split a batch can be compared."""

    def refill(sampler: BufferedMontecloraSampler) -> None:
        of, generator = sampler.model, torch.Generator().manual_seed(0)
        sampler.buffer = [
            {
                "z_mvn": torch.randn(of.num_samples, of.in_features, of.out_features, generator=generator),
                "z_wishart": of.out_features * torch.eye(of.out_features),
                "z_dirichlet": torch.randn(of.num_samples, generator=generator),
            }
        ]
        sampler.index = 0

    with mock.patch.object(BufferedMontecloraSampler, "_refill_buffer", refill):
        yield


def check_checkpointing(make: Callable[..., BALoRATrainer], method: str, base: Path, folder: Path) -> None:
    """Assert that gradient checkpointing changes no trained weight. make: trainer_of or nlu_trainer_of."""
    weights = []
    for on in (False, True):
        words = ["trainer.gradient_checkpointing=true"] if on else []
        settings = {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trained = make(method, base, folder / str(on), *words, **settings)
        trained.train()
        weights.append(adapter_weights(trained.model))
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-5, atol=1e-6)


def check_two_processes(worker: str, words: list[str], methods: Collection[str], folder: Path, root: Path) -> None:
    """Assert that each method's weights are the same, trained by one process with accumulation 2 and by two, within a
    hundredth of how far they move. Steps have the size of their gradients (`sized_steps`)."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    weights = []
    for start, accumulation, processes in (([sys.executable], "2", 1), (launch, "1", 2)):
        out = folder / f"{accumulation}.pt"
        command = [*start, str(root / "tests" / "workers" / worker), *words, accumulation, str(out), *methods]
        subprocess.run(command, env=environment, check=True, timeout=3600)
        result = torch.load(out)
        assert result["processes"] == processes
        weights.append(result["weights"])
        start = result["start"]
    one, two = weights
    for method in methods:
        filled = {name: value for name, value in start[method].items() if value.numel()}
        moved = {name: (one[method][name] - value).abs().max().item() for name, value in filled.items()}
        assert max(moved.values()) > 1e-4, method
        for name, far in moved.items():
            torch.testing.assert_close(
                two[method][name],
                one[method][name],
                rtol=0,
                atol=1e-2 * far + 1e-6,
                msg=lambda text, where=(method, name): f"{where}: {text}",
            )


def sized_steps(config: Any) -> dict[str, Any]:
    """Return settings under which a step has the size of its gradient: plain gradient descent or, where a method is
    built on AdamW, an ε beside which no gradient counts."""
    if optimizer_facts(config.adapter).get("replaces_adamw"):
        return {"adam_epsilon": 100.0, "learning_rate": 5.0}
    return {"optim": "sgd", "learning_rate": 0.5}


NLU_OFF = NLURegularizersConfig(lambda_consistency=0, lambda_diversity=0, lambda_svd=0)


def nlu_trainer_of(
    method: str, encoder: Path, folder: Path, *overrides: str, rows: Any = None, regularizers: Any = NLU_OFF, **settings
):
    """A trainer of a classifier on the tiny encoder in a folder, by default on 16 self-made pairs."""
    config = nlu_config(encoder, *overrides, method=method)
    torch.manual_seed(1)
    model, _ = build_model(config, run_path=folder / "run", num_steps=4)
    return classifier_trainer(
        model,
        arguments(folder, **{"learning_rate": 1e-2} | settings),
        regularizers=regularizers,
        train_dataset=tiny_pairs(encoder, 16) if rows is None else rows,
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(encoder)),
    )
