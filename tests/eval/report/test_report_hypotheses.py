"""Hypotheses over pre-trained models: what is asked of a table's file, the effect, its test, the decision."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from eval.report.block import Figure
from eval.report.figures import draw_figures
from eval.report.hypotheses import Clusters, decide_all, effect, level_of, parse_hypotheses, standing
from eval.report.hypothesis_figures import chosen_settings, draw_forest, draw_tradeoff
from eval.report.render import to_markdown
from eval.report.table import build_table
from tests.support.report_world import World

METHODS, LEVELS = ("untuned", "pissa", "ba_lora"), ("noise=40", "noise=0")
ROWS = [Row("toy", method, f"{level} base={b}") for method in METHODS for level in LEVELS for b in range(5)]
H1 = {
    "says": "…",
    "column": "wrong",
    "arms": ["ba_lora", "pissa"],
    "levels": [*LEVELS],
    "expected": "below",
    "margin": 1,
}
IDS = tuple(f"item/{number}" for number in range(60))
CONDITION = H1 | {"arms": ["untuned"], "expected": "above", "margin": 5, "condition": True}


def parse(**entries):
    return parse_hypotheses(entries, ROWS, ["wrong", "accuracy"], clusters="base", where="report.hypotheses")


def found(entries, means, *, missing=(), sd=0.2, num_items=60, seed=0, rows=ROWS):
    """Decide on runs with these means, (method, level) → column → value, two runs a model."""
    random = np.random.default_rng(seed)
    easy_N = random.normal(size=num_items)

    def values(row, column):
        mean = means[row.method, level_of(row, "base")].get(column, 50.0)
        model = random.normal(0, sd)
        return IDS[:num_items], mean + model + easy_N + random.normal(0, 0.2, (2, num_items))

    clusters = Clusters(rows, "base", values, lambda row, column: 2 * ((row.method, level_of(row, "base")) in missing))
    return {one.hypothesis.name: one for one in decide_all(parse(**entries), clusters)}


def means(*, pissa=(10.0, 1.0), ba_lora=(10.0, 1.0), untuned=(30.0, 1.0), accuracy=50.0):
    of = {"pissa": pissa, "ba_lora": ba_lora, "untuned": untuned}
    return {
        (method, level): {"wrong": of[method][place], "accuracy": accuracy if method == "ba_lora" else 50.0}
        for method in METHODS
        for place, level in enumerate(LEVELS)
    }


@pytest.mark.parametrize(
    ("ba_lora", "sd", "decision"),
    [
        ((6.0, 1.0), 0.2, "supported"),
        ((10.0, 1.0), 0.2, "refuted"),
        ((13.0, 1.0), 0.2, "refuted"),
        ((10.0, 1.0), 3.0, "undecided"),
    ],
)
def test_the_interval_decides(ba_lora, sd, decision):
    one = found({"H1": H1}, means(ba_lora=ba_lora), sd=sd)["H1"]
    assert one.decision == decision and one.num_clusters == (5, 5) and one.num_items == 60
    assert one.difference == pytest.approx(ba_lora[0] - 10.0, abs=0.6 if sd < 1 else 8)


def test_a_lower_level_is_subtracted():
    """What the regularizers do without noise is not inheritance."""
    assert found({"H1": H1}, means(ba_lora=(6.0, -3.0)))["H1"].decision == "refuted"


def test_the_other_direction():
    entries = {"H3": H1 | {"expected": "above"}}
    assert found(entries, means(ba_lora=(14.0, 1.0)))["H3"].decision == "supported"
    assert found(entries, means(ba_lora=(6.0, 1.0)))["H3"].decision == "refuted"


def test_a_guard_and_a_condition():
    guarded = {"H1": H1 | {"guard": {"column": "accuracy", "margin": 1}}}
    one = found(guarded, means(ba_lora=(6.0, 1.0), accuracy=45.0))["H1"]
    assert one.decision == "undecided" and one.guard == pytest.approx(-5, abs=0.5)
    assert found(guarded, means(ba_lora=(6.0, 1.0), accuracy=51.0))["H1"].decision == "supported"
    both = {"H0": CONDITION, "H1": H1}
    found_ = found(both, means(ba_lora=(6.0, 1.0), untuned=(4.0, 1.0)))
    assert (found_["H0"].decision, found_["H1"].decision) == ("does not hold", "void")
    found_ = found(both, means(ba_lora=(6.0, 1.0)))
    assert (found_["H0"].decision, found_["H1"].decision) == ("holds", "supported")


def test_nothing_is_told_before_all_runs_are_there():
    one = found({"H1": H1}, means(ba_lora=(6.0, 1.0)), missing=[("pissa", "noise=0")])["H1"]
    assert one.decision == "not run" and one.num_missing == 10 and one.difference is one.p is None


def test_a_condition_that_is_not_run_lets_no_other_through():
    both = {"H0": CONDITION, "H1": H1}
    found_ = found(both, means(ba_lora=(6.0, 1.0)), missing=[("untuned", "noise=0")])
    assert (found_["H0"].decision, found_["H1"].decision) == ("not run", "undecided")
    assert found_["H1"].difference is found_["H1"].p is found_["H1"].low is None and found_["H1"].num_missing == 0


def test_four_models_decide_nothing():
    rows = [row for row in ROWS if not row.setting.endswith("base=4")]
    found_ = found({"H0": CONDITION, "H1": H1}, means(ba_lora=(6.0, 1.0)), rows=rows)
    assert {one.decision for one in found_.values()} == {"undecided"} and found_["H1"].num_clusters == (4, 4)


def test_holm_counts_what_was_not_run():
    primary = H1 | {"primary": True}
    missing = [("untuned", "noise=40")]
    both = {"H1": primary, "H2": primary | {"arms": ["untuned", "pissa"]}}
    found_ = found(both, means(ba_lora=(6.0, 1.0)), missing=missing)
    assert found_["H2"].decision == "not run"
    assert found_["H1"].p_adjusted == pytest.approx(2 * found_["H1"].p)


def test_models_are_the_sample_where_items_are_alike():
    random = np.random.default_rng(3)
    high, low = random.normal(2, 1, 5), random.normal(0, 1, 5)
    one = effect([np.tile(high[:, None], 20), np.tile(low[:, None], 20)])
    wanted = scipy.stats.ttest_ind(high, low, equal_var=False)
    assert (one.p, one.difference) == pytest.approx((wanted.pvalue, high.mean() - low.mean()))
    alone = effect([np.tile(high[:, None], 20)])
    assert alone.p == pytest.approx(scipy.stats.ttest_1samp(high, 0).pvalue)


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("sd", [0.0, 1.0, 4.0])
def test_no_effect_is_seldom_called_one(sd, is_flat):
    """Of 2000 experiments without an effect, 5 models a level, arms that differ by chance: at most 6 %.

    is_flat: nothing varies at the second level, as of a wrong rule without noise.
    """
    random, wrong = np.random.default_rng(1), 0
    for _ in range(2000):
        easy_N = random.normal(0, 0 if is_flat else 10, 120)
        high, low = (
            random.normal(0, sd, (5, 1)) + 0.1 * easy_N + random.normal(0, 3, (5, 120)) + random.normal(0, 1, 120)
            for _ in range(2)
        )
        wrong += effect([high, np.zeros_like(low) if is_flat else low]).p < 0.05
    assert 0.01 < wrong / 2000 <= 0.06


def test_without_items_the_models_alone_are_the_sample():
    random = np.random.default_rng(5)
    high, low = random.normal(2, 1, (5, 40)), random.normal(0, 1, (5, 40))
    wanted = scipy.stats.ttest_ind(high.mean(axis=1), low.mean(axis=1), equal_var=False)
    one = effect([high.mean(axis=1, keepdims=True), low])
    assert (one.p, one.low, one.high) == pytest.approx((wanted.pvalue, *wanted.confidence_interval()))
    assert one.num_items is None
    alone = effect([high.mean(axis=1, keepdims=True)])
    assert alone.p == pytest.approx(scipy.stats.ttest_1samp(high.mean(axis=1), 0).pvalue)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arms": ["dora"]}, "dora is unknown"),
        ({"levels": ["noise=30"]}, "noise=30 is unknown"),
        ({"levels": ["noise=40 base=1"]}, "is unknown"),
        ({"column": "right"}, "right is unknown"),
        ({"expected": "lower"}, "expected=lower is unknown"),
        ({"margin": -1}, "margin must be a number of at least 0"),
        ({"arms": []}, "one or two are needed"),
        ({"guard": {"column": "wrong"}}, "guard.margin is missing"),
        ({"primary": "yes please"}, "primary: yes please: true or false is needed"),
        ({"p": 1}, "unknown key p"),
    ],
)
def test_a_wrong_entry_is_told(change, told):
    with pytest.raises(UserError, match=told):
        parse(H1=H1 | change)


def test_what_an_entry_needs_and_how_many_are_primary():
    with pytest.raises(UserError, match="margin is missing"):
        parse(H1={key: value for key, value in H1.items() if key != "margin"})
    with pytest.raises(UserError, match="6 primary hypotheses, at most 5"):
        parse(**{f"H{i}": H1 | {"primary": True} for i in range(6)})


def test_arms_need_the_same_models():
    rows = [row for row in ROWS if row != Row("toy", "pissa", "noise=40 base=2")]
    clusters = Clusters(rows, "base", lambda row, column: (IDS[:4], np.zeros((2, 4))), lambda row, column: 0)
    with pytest.raises(UserError, match="have not the same pre-trained models"):
        decide_all(parse(H1=H1), clusters)


def test_what_is_confirmatory():
    tests = {"rows": [1], "report": {"hypotheses": {}}}
    record = {"declared_at": "2026-01-01", "commit": "abc", "num_results": 0, "tests": tests, "sha256": "1" * 64}
    then, now, other = f"sha256 {'1' * 12}", f"now it has the sha256 {'2' * 12}", "2" * 64

    def told(declared, deciding, sha256, any_primary=True):
        return standing(declared, deciding, sha256, any_primary=any_primary)

    first = f"declared before the first run (2026-01-01, commit abc, {then}); the table's file is the same."
    assert told(record, tests, "1" * 64) == f"Confirmatory: {first}"
    assert told(record, tests, "1" * 64, any_primary=False) == f"Exploratory: no hypothesis is primary; {first}"
    assert told(record, tests, other).endswith(
        f"{then}); the table's file was changed since in what decides nothing: {now}."
    )
    dirty = told(record | {"dirty": True}, tests, "1" * 64)
    assert dirty == f"Exploratory: the table's file was not committed when it was recorded; {first}"
    changed = told(record, tests | {"rows": [2]}, other)
    assert "changed since the first run" in changed and then in changed and now in changed
    before = told(record | {"num_results": 3}, tests, other)
    assert "3 results were there" in before and then in before and now in before
    unknown = told(None, tests, other)
    assert unknown.startswith("Exploratory") and now in unknown


# ---- a whole table


BASES, RUN_SEEDS = range(1, 6), (1, 2)
SHARES = {"untuned": (8, 2), "pissa": (6, 2), "ba_lora": (4, 2)}  # of ten items, at the two levels
FIGURES = (
    Figure("dose", "dose", columns=("gsm8k",), x="noise"),
    Figure("front", "tradeoff", columns=("gsm8k",), x="hours", level="noise=40"),
    Figure("forest", "forest"),
)


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    for row in ROWS:
        high, low = SHARES[row.method]
        number = high if "noise=40" in row.setting else low
        base = int(row.setting[-1])
        for seed in RUN_SEEDS:
            grades = [float((item + base + seed) % 10 < number) for item in range(10)]
            made.add(row.method, seed, setting=row.setting.replace(" ", "_"), grades=grades)
    return made


def spec(world, **changes):
    rows = tuple(Row("tiny", row.method, row.setting) for row in ROWS)
    columns = [column for column in world.spec().columns if column.name != "average"]
    entry = H1 | {"column": "gsm8k"}
    runs = {
        (row, column.name): tuple(
            world.run(row.method, seed, setting=row.setting.replace(" ", "_")) for seed in RUN_SEEDS
        )
        for row in rows
        for column in columns
    }
    hypotheses = parse_hypotheses({"H1": entry}, rows, ["gsm8k"], clusters="base", where="x")
    fields = {"rows": rows, "columns": tuple(columns), "runs": runs, "paper": (), "clusters": "base"}
    return world.spec(**(fields | {"hypotheses": hypotheses, "figures": FIGURES} | changes))


def test_a_table_of_models_from_its_runs_to_its_figures(world):
    made = spec(world)
    sources = world.sources(made)
    table = build_table(made, sources)
    (one,) = table.findings
    assert one.difference == pytest.approx(-20) and one.num_clusters == (5, 5) and one.num_items == 10
    assert not table.comparisons  # two rows of one model tell nothing
    text = to_markdown(table)
    assert "| H1 | … | " in text and "−20.00" in text and "Exploratory: it is not recorded" in text
    assert "| noise=40 | PiSSA | 60.00 ± 0.00 (5) |" in text
    figures = {drawn.name: (drawn, files) for drawn, files in draw_figures(table, sources)}
    assert all(drawn.missing is None and set(files) == {"png", "pdf"} for drawn, files in figures.values())
    assert "n = 5 pre-trained models" in figures["dose"][0].caption and "H1: …" in figures["forest"][0].caption
    assert "Dashed" not in figures["front"][0].caption  # one arm is best in both, no line is drawn


def test_the_front_is_told_where_there_is_one(world):
    for row in ROWS:  # the more right answers, the more hours
        hours = SHARES[row.method][0]
        for seed in RUN_SEEDS:
            run = world.run(row.method, seed, setting=row.setting.replace(" ", "_"))
            world.edit(run, **{"training/seconds": 3600.0 * hours})
    made = spec(world)
    _, caption = draw_tradeoff(build_table(made, world.sources(made)), FIGURES[1])
    assert caption.endswith("Dashed: the arms that none beats in both.")


def test_a_run_that_is_missing_leaves_effect_mean_and_figure_blank(world):
    (world.folder / "runs" / "tiny-pissa-noise=40_base=2-s1.json").unlink()
    made = spec(world)
    table = build_table(made, world.sources(made))
    assert "not run: 1 runs are missing" in to_markdown(table) and "| noise=40 | PiSSA | 60.00" not in to_markdown(
        table
    )
    missing = {one.name: one.missing for one, _ in draw_figures(table, world.sources(made))}
    assert missing["forest"] == "no arm has all its values yet"


def test_where_grades_are_not_at_hand_the_models_alone_count_and_that_is_told(world):
    made = spec(world)
    with_items = build_table(made, world.sources(made))
    assert "by the models only" not in to_markdown(with_items)
    run = world.run("pissa", 1, setting="noise=40_base=2")
    (run.run_path / "grades" / "gsm8k.jsonl").unlink()
    world.edit(run, **{"evaluation/gsm8k/metrics/strict": 0.7})
    table = build_table(made, world.sources(made))
    (one,) = table.findings
    assert one.difference == pytest.approx(-21) and one.num_items is None and one.num_clusters == (5, 5)
    (before,) = with_items.findings
    assert one.low < one.difference < one.high and before.num_items == 10
    assert (
        "Where no items are given, grades are not at hand: interval, p and decision are by the models only"
        in to_markdown(table)
    )
    _, caption = draw_forest(table, FIGURES[2])
    assert caption.startswith("Effects with 95 % intervals over models; dotted: the margin. H1")
    primary = dataclasses.replace(one, hypothesis=dataclasses.replace(one.hypothesis, primary=True))
    _, caption = draw_forest(dataclasses.replace(table, findings=(primary,)), FIGURES[2])
    assert "the margin. Dots: primary. H1" in caption


def test_items_that_differ_between_runs_are_refused(world):
    world.add("pissa", 1, setting="noise=40_base=2", grades=[1.0] * 9)
    made = spec(world)
    with pytest.raises(
        UserError, match="s2 has other items than tiny-pissa-noise=40_base=2-s1 for column gsm8k: score"
    ):
        build_table(made, world.sources(made))


@pytest.mark.parametrize(
    ("arms", "levels", "number", "told"),
    [
        (("pissa",), ("noise=40",), 9, "ba_lora and pissa at noise=40"),
        (("pissa",), ("noise=40",), 10, "ba_lora and pissa at noise=40"),
        (("pissa", "ba_lora"), ("noise=40",), 9, "noise=40 and noise=0"),
    ],
)
def test_arms_and_levels_on_other_items_are_refused(world, arms, levels, number, told):
    """Also where there are as many of them."""
    for row in ROWS:
        if row.method in arms and level_of(row, "base") in levels:
            for seed in RUN_SEEDS:
                run = world.add(row.method, seed, setting=row.setting.replace(" ", "_"), grades=[1.0] * number)
                path = run.run_path / "grades" / "gsm8k.jsonl"
                path.write_text(path.read_text().replace("gsm8k/0", "gsm8k/00"))
    made = spec(world)
    with pytest.raises(UserError, match=f"{told} have other items in column gsm8k: score both on one file"):
        build_table(made, world.sources(made))


def test_grades_that_are_not_those_of_the_score_count_as_unknown(world):
    run = world.run("pissa", 1, setting="noise=40_base=2")
    world.edit(run, **{"evaluation/gsm8k/metrics/strict": 0.7})
    made = spec(world)
    (one,) = build_table(made, world.sources(made)).findings
    assert one.difference == pytest.approx(-21) and one.num_items is None


def test_the_guards_value_is_told_beside_the_decision(world):
    entry = H1 | {"column": "gsm8k", "guard": {"column": "gsm8k", "margin": 1}}
    rows = spec(world).rows
    guarded = spec(world, hypotheses=parse_hypotheses({"H1": entry}, rows, ["gsm8k"], clusters="base", where="x"))
    text = to_markdown(build_table(guarded, world.sources(guarded)))
    assert " (guard not kept: GSM8K −20.00, at least −1.00) | −20.00 |" in text


def test_the_best_level_is_chosen_when_all_have_been_tried(world):
    made = spec(world, hypotheses=(), figures=(), choose="gsm8k")
    assert chosen_settings(build_table(made, world.sources(made))) == dict.fromkeys(METHODS, ["noise=40"])
    lower = tuple(dataclasses.replace(column, better="lower") for column in made.columns)
    made = spec(world, hypotheses=(), figures=(), choose="gsm8k", columns=lower)
    assert chosen_settings(build_table(made, world.sources(made))) == dict.fromkeys(METHODS, ["noise=0"])
    (world.folder / "runs" / "tiny-pissa-noise=40_base=2-s1.json").unlink()
    made = spec(world, hypotheses=(), figures=(), choose="gsm8k")
    assert chosen_settings(build_table(made, world.sources(made))) == {}
