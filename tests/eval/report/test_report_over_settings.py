"""How much hangs on a method's settings: made-up results with known answers."""

import pytest

from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from eval.report.block import parse_report
from eval.report.columns import ReportColumn
from eval.report.over_settings import over_settings
from eval.report.render import to_json, to_latex, to_markdown
from tests.support.report_world import SEEDS, World, build

SETTINGS = {"a=1": (3, 1), "a=2": (7, 2), "a=3": (5, 4), "a=4": None, "a=5": None}  # right of ten, hours


def test_best_median_worst_and_spread_of_a_method(tmp_path):
    """Of five settings one has failed and one is yet to be made: they are told, and in no number."""
    world, rows = World(tmp_path), [Row("tiny", "lora", name) for name in SETTINGS]
    for row in rows[:4]:
        for seed in SEEDS:
            if SETTINGS[row.setting] is None:
                world.add("lora", seed, setting=row.setting, grades=None, status="failed", error="diverged")
                continue
            right, hours = SETTINGS[row.setting]
            grades = [float(item < right) for item in range(10)]
            world.add("lora", seed, setting=row.setting, grades=grades, **{"training/seconds": 3600 * hours})
    runs = {
        (row, name): tuple(world.run("lora", seed, setting=row.setting) for seed in SEEDS)
        for row in rows
        for name in ("gsm8k", "hours")
    }
    table = build(world, rows=tuple(rows), runs=runs, over_settings=("gsm8k", "hours"))
    accuracy, hours = over_settings(table)
    assert (accuracy.best, accuracy.median, accuracy.worst, accuracy.spread) == pytest.approx((70, 50, 30, 40))
    assert (accuracy.num_settings, accuracy.num_failed, accuracy.best_setting) == (5, 1, "a=2")
    assert (hours.best, hours.median, hours.worst, hours.spread) == pytest.approx((1, 2, 4, 3))  # lower is better
    assert hours.num_missing == 1
    assert "| tiny | lora | 70.00 | 50.00 | 30.00 | 40.00 | 5, 1 failed, 1 missing | 1.0 |" in to_markdown(table)
    assert to_json(table)["over_settings"][0]["spread"] == accuracy.spread
    assert "70.00 & 50.00 & 30.00 & 40.00" in to_latex(table)
    assert "over_settings" not in to_json(build(world, rows=tuple(rows), runs=runs))
    runs[Row("tiny", "lora", "a=2"), "gsm8k"][
        0
    ].result_path.unlink()  # of the best: the other seeds do not stand for it
    accuracy, _ = over_settings(build(world, rows=tuple(rows), runs=runs, over_settings=("gsm8k", "hours")))
    assert (accuracy.num_failed, accuracy.num_missing) == (1, 2) and accuracy.best < 70


def test_a_column_that_ranks_nothing_has_no_spread():
    columns = [ReportColumn("a", "A", task="gsm8k", metric="strict"), ReportColumn("b", "B", metric="x", better="none")]
    assert parse_report({"over_settings": ["a"]}, rows=[], columns=columns, source="t")["over_settings"] == ("a",)
    with pytest.raises(UserError, match="over_settings=b is unknown: choose one of a"):
        parse_report({"over_settings": ["b"]}, rows=[], columns=columns, source="t")
