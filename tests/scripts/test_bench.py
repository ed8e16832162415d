"""scripts/bench.py: rows with the agreed keys, appended with their circumstances, and the count of operations."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest

from ba_lora.errors import UserError
from scripts import bench as bench_script
from scripts import bench_cases, bench_nlu
from scripts.bench import PRINTED, SHAPES, STORED, append, kind
from scripts.bench_cases import Shape, operations
from tests.conftest import ROOT


def bench(results, *words, shape="toy"):
    command = [sys.executable, "scripts/bench.py", "--device", "cpu", "--shape", shape, "--results", str(results)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)


def runnable(shape):
    """The cases whose packages are here; pissa_cce's is in no requirements: on Linux it brings a triton of 200 MB."""
    return [case for case in kind(shape).CASES if bench_cases.lacks(case, "cpu") is None]


def check(folder, cases, *words, shape="toy"):
    """Run the cases: a row for each, in the order of `cases`, with ratios to the stock PiSSA last before it."""
    results = folder / "bench.csv"
    done = bench(results, "--cases", ",".join(cases), "--repeats", "3", "--warmup", "1", *words, shape=shape)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert [tuple(row) for row in printed] == [PRINTED] * len(cases)
    assert [row["case"] for row in printed] == list(cases)
    stored, stock = list(csv.DictReader(open(results, encoding="utf-8"))), None
    for row, kept in zip(printed, stored, strict=True):
        stock = row if row["case"] == "pissa" else stock
        assert (row["device"], row["shape"], row["vocab"]) == ("cpu", shape, 512)
        assert row["step_s"] > 0 and row["peak_mb"] > 100
        assert row["tokens_per_s"] == pytest.approx(sum(SHAPES[shape].lengths(row["case"])) / row["step_s"], rel=0.01)
        assert row["step_ratio"] == pytest.approx(row["step_s"] / stock["step_s"], rel=0.02)
        assert row["memory_ratio"] == pytest.approx(row["peak_mb"] / stock["peak_mb"], rel=1e-3)
        pissa = [other for other in printed if other["case"].startswith("pissa")]
        best = min(pissa, key=lambda other: other["step_s"]) if len({*cases}) == len(cases) else stock
        assert row["best_step_ratio"] == pytest.approx(row["step_s"] / best["step_s"], rel=0.02)
        assert row["best_memory_ratio"] == pytest.approx(row["peak_mb"] / best["peak_mb"], rel=1e-3)
        assert {name: str(value) for name, value in row.items()} == {name: kept[name] for name in PRINTED}
        assert kept["repeats"] == "3" and "torch=" in kept["versions"] and len(kept["commit"]) == 40
        assert kept["attention"] == ("packed_sdpa" if row["case"] == "packed" else "sdpa")
    assert results.with_suffix(".png").stat().st_size > 1000


@pytest.mark.slow
def test_a_row_for_each_case(tmp_path):
    check(tmp_path, ("pissa", "fused"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["toy", "toy-nlu"])
def test_every_case_runs(tmp_path, shape):
    check(tmp_path, runnable(shape), shape=shape)


@pytest.mark.slow
def test_each_group_has_its_own_stock_pissa(tmp_path):
    check(tmp_path, ("pissa", "fused_no_svd", "pissa", "fused_cache_no_svd"), "--together", "1")


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        (["--device", "cpu", "--cases", "fused,plain,lora"], ["pissa fused plain lora"]),
        (["--device", "cuda", "--cases", "fused,plain,lora"], ["pissa fused", "pissa plain", "pissa lora"]),
        (["--device", "cuda", "--cases", "fused,plain,lora", "--together", "2"], ["pissa fused plain", "pissa lora"]),
        (["--device", "cpu", "--cases", "fused,pissa,lora", "--together", "1"], ["pissa fused", "pissa lora"]),
        (["--device", "cuda", "--cases", "pissa"], ["pissa"]),
        (
            ["--device", "cuda", "--cases", "fused,pissa_fused,lora"],
            ["pissa pissa_fused fused", "pissa pissa_fused lora"],
        ),
    ],
)
def test_cases_that_take_turns(tmp_path, monkeypatch, capsys, words, groups):
    """All of them on a CPU, pairs on a GPU; a group is printed and stored when it is done."""
    seen, folders = [], set()

    def measure(cases, shape, vocabulary, device, folder, **settings):
        assert (shape, vocabulary, device) == ("toy", 512, words[1]) and folder.is_dir()
        rows = results.read_text().splitlines()[1:] if seen else []
        assert [row.split(",")[0] for row in rows] == " ".join(seen).split()
        seen.append(" ".join(cases))
        folders.add(folder)
        return [dict.fromkeys(STORED, 1) | {"case": case} for case in cases]

    results = tmp_path / "bench.csv"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(bench_script, "measure", measure)
    monkeypatch.setattr("sys.argv", ["bench.py", "--shape", "toy", "--results", str(results), *words])
    bench_script.main()
    assert seen == groups and len(folders) == 1
    assert [json.loads(line)["case"] for line in capsys.readouterr().out.splitlines()] == " ".join(groups).split()


def test_the_svd_term_is_left_out_by_default_only_for_a_gpus_shape(tmp_path):
    without = ("fused_no_svd", "fused_cache_no_svd")
    assert set(without) < set(SHAPES["llama2-7b"].cases) == {*bench_cases.CASES}
    assert not set(without) & {*SHAPES["default"].cases, *SHAPES["toy"].cases}
    settings = SHAPES["toy"], 512, "cpu", tmp_path
    without = bench_cases.build_trainer("fused_no_svd", *settings).objective.terms
    assert [term.name for term in without] == ["task", "consistency", "diversity"]
    assert [term.name for term in bench_cases.build_trainer("fused", *settings).objective.terms][-1] == "svd"
    assert [term.name for term in bench_cases.build_trainer("pissa_fused", *settings).objective.terms] == ["task"]


def test_unequal_rows_take_flash_attention_where_it_can_run(flash_attention_installed):
    shape, chosen = SHAPES["llama2-7b"], bench_cases.attention
    assert chosen("packed", shape, "cuda") == chosen("padded", shape, "cuda") == "flash_attention_2"
    assert chosen("pissa", shape, "cuda") == chosen("fused", shape, "cuda") == "sdpa"
    assert chosen("packed", shape, "cpu") == chosen("packed", SHAPES["default"], "cuda") == "sdpa"


def test_without_flash_attention_unequal_rows_take_sdpa():
    assert bench_cases.attention("packed", SHAPES["llama2-7b"], "cuda") == "sdpa"


def test_the_best_pissa_is_among_the_cases_wherever_its_package_is(tmp_path, monkeypatch, capsys):
    """By default what cannot run is left out by name; asked for, it is refused before anything runs."""
    ran, installed = [], set()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(bench_cases.importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(bench_script, "measure", lambda cases, *_, **__: ran.append(cases) or [])
    monkeypatch.setattr(bench_script, "append", lambda *_: None)
    monkeypatch.setattr(bench_script, "plot", lambda *_: None)

    def told(*words):
        ran.clear()
        monkeypatch.setattr("sys.argv", ["bench.py", "--shape", "toy", "--results", str(tmp_path / "b.csv"), *words])
        bench_script.main()
        return capsys.readouterr().err.splitlines()

    cce = "no cut_cross_entropy, no triton here: pip install -e '.[bench]'"
    assert told("--device", "cpu") == [
        f"pissa_cce is left out: {cce}",
        "pissa_liger is left out: Liger's kernels need CUDA",
    ]
    assert ran[0][:2] == ["pissa", "pissa_fused"] and not {"pissa_cce", "pissa_liger"} & set(ran[0])
    installed |= {"cut_cross_entropy", "liger_kernel", "triton"}
    sixteen = ("--device", "cuda", "--shape", "default-bf16")
    assert not told(*sixteen) and all(group[:4] == list(bench_cases.PISSA) for group in ran)
    (left_out,) = told("--device", "cuda")
    assert left_out == "pissa_cce is left out: cut-cross-entropy's kernels need 16 bits: --shape default-bf16"
    for visible, seen in (("3,1", "3"), ("", "")):  # several GPUs in one process would share a step out
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        told(*sixteen)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    with pytest.raises(UserError, match="--cases: pissa_liger: Liger's kernels need CUDA"):
        told("--device", "cpu", "--cases", "pissa_liger")


def test_liger_is_switched_on_by_trainers_own_word(tmp_path, monkeypatch):
    """It cannot run here; what Trainer would hand to Liger can be seen."""
    from transformers import Trainer

    seen = []
    monkeypatch.setattr(Trainer, "__init__", lambda self, model, arguments, **_: seen.append(arguments))
    bench_cases.build_trainer("pissa_liger", SHAPES["toy"], 512, "cpu", tmp_path)
    bench_cases.build_trainer("pissa", SHAPES["toy"], 512, "cpu", tmp_path)
    liger, stock = seen
    assert liger.use_liger_kernel and not stock.use_liger_kernel
    assert [name for name, on in liger.liger_kernel_config.items() if on] == ["fused_linear_cross_entropy"]


def test_every_pissa_computes_in_the_same_precision(tmp_path, monkeypatch):
    """Their Trainers differ in how they call the model. The package is not here: a loss of its name stands in."""
    import torch

    def linear_cross_entropy(hidden, weight, labels, *, shift, reduction, impl):
        logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction=reduction)

    stand_in = types.SimpleNamespace(linear_cross_entropy=linear_cross_entropy)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", stand_in)
    shape = dataclasses.replace(SHAPES["toy"], dtype="bfloat16")
    seen = {}
    for case in ("pissa", "pissa_fused", "pissa_cce"):
        trainer = bench_cases.build_trainer(case, shape, 512, "cpu", tmp_path)
        factors = [module for name, module in trainer.model.named_modules() if name.endswith("lora_A.default")]
        for module in factors:
            module.register_forward_hook(
                lambda module, inputs, output, case=case: seen.setdefault(case, set()).add(output.dtype)
            )
        trainer.args.max_steps = 1
        trainer.train()
    assert seen == dict.fromkeys(seen, {torch.bfloat16}) and len(seen) == 3


def test_an_unknown_case_is_refused(tmp_path):
    done = bench(tmp_path / "bench.csv", "--cases", "pisa")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "pisa is unknown: choose among pissa" in done.stderr


def test_rows_are_appended_and_never_to_a_table_of_other_columns(tmp_path):
    path = tmp_path / "bench.csv"
    row = dict.fromkeys(STORED, "1")
    append(path, [row])
    append(path, [row, row])
    assert path.read_text() == ",".join(STORED) + "\n" + 3 * (",".join("1" * len(STORED)) + "\n")
    path.write_text("case,step_s\n")
    with pytest.raises(UserError, match="other columns"):
        append(path, [row])
    assert path.read_text() == "case,step_s\n"


def test_operations_by_hand():
    """One layer, width 2, inner 3, rank 1, vocabulary 5; one row of 4 tokens, 3 of them response."""
    shape = Shape((5,), hidden=2, layers=1, heads=1, intermediate=3, batch=1, length=4, response=3, rank=1)
    frozen, factors, head = 4 * 4 + 3 * 6, 4 * 4 + 3 * 5, 10
    trained = 4 * (frozen + factors) + 4 * (frozen + 2 * factors)
    assert operations("pissa", shape, 5) == operations("lora", shape, 5) == trained + 2 * 4 * head
    assert operations("official", shape, 5) == trained + 4 * frozen + 3 * 4 * head
    assert operations("fused", shape, 5) == operations("plain", shape, 5) == trained + 4 * (frozen + factors) + 90
    for case in ("fused_cache", "pissa_fused", "pissa_cce", "pissa_liger"):
        assert operations(case, shape, 5) == trained + 2 * 3 * head
    for case in ("fused", "fused_cache"):  # the svd term's own products are left out of the count
        assert operations(f"{case}_no_svd", shape, 5) == operations(case, shape, 5)


def test_operations_of_a_classifier_by_hand():
    """One layer, width 2, inner 3, rank 1; two rows of 4 tokens."""
    shape = bench_nlu.EncoderShape((5,), hidden=2, layers=1, heads=1, intermediate=3, batch=2, length=4, rank=1)
    frozen, factors = 4 * 4 + 2 * 6, 4 * 4 + 2 * 5
    trained = 8 * (frozen + factors) + 8 * (frozen + 2 * factors)
    assert bench_nlu.operations("pissa", shape, 5) == bench_nlu.operations("ba_lora_cache", shape, 5) == trained
    assert bench_nlu.operations("ba_lora", shape, 5) == trained + 8 * (frozen + factors)


def test_unequal_rows_are_the_same_for_both_and_shorter_than_full_ones():
    shape = SHAPES["default"]
    assert shape.lengths("fused") == [256] * 4
    assert shape.lengths("padded") == shape.lengths("packed") == [69, 100, 133, 193]
