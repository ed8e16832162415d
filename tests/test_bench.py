"""scripts/bench.py: rows with the agreed keys, appended with their circumstances, and the count of operations."""

import csv
import json
import os
import subprocess
import sys

import pytest

from ba_lora.errors import UserError
from scripts import bench_nlu
from scripts.bench import PRINTED, SHAPES, STORED, append, kind
from scripts.bench_cases import Shape, operations
from tests.conftest import ROOT


def bench(results, *words, shape="toy"):
    command = [sys.executable, "scripts/bench.py", "--device", "cpu", "--shape", shape, "--results", str(results)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def check(folder, cases, shape="toy"):
    results = folder / "bench.csv"
    done = bench(results, "--cases", ",".join(cases), "--repeats", "3", "--warmup", "1", shape=shape)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert [tuple(row) for row in printed] == [PRINTED] * len(cases)
    assert [row["case"] for row in printed] == list(cases)
    stored = list(csv.DictReader(open(results, encoding="utf-8")))
    for row, kept in zip(printed, stored, strict=True):
        assert (row["device"], row["shape"], row["vocab"]) == ("cpu", shape, 512)
        assert row["step_s"] > 0 and row["peak_mb"] > 100
        assert row["tokens_per_s"] == pytest.approx(sum(SHAPES[shape].lengths(row["case"])) / row["step_s"], rel=0.01)
        assert row["step_ratio"] == pytest.approx(row["step_s"] / printed[0]["step_s"], rel=0.02)
        assert row["memory_ratio"] == pytest.approx(row["peak_mb"] / printed[0]["peak_mb"], rel=1e-3)
        assert {name: str(value) for name, value in row.items()} == {name: kept[name] for name in PRINTED}
        assert kept["repeats"] == "3" and "torch=" in kept["versions"] and len(kept["commit"]) == 40
    assert results.with_suffix(".png").stat().st_size > 1000


def test_a_row_for_each_case(tmp_path):
    check(tmp_path, ("pissa", "fused"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["toy", "toy-nlu"])
def test_every_case_runs(tmp_path, shape):
    check(tmp_path, kind(shape).CASES, shape)


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
    assert operations("fused_cache", shape, 5) == trained + 2 * 3 * head


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
