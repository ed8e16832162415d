"""The report's figures: what is drawn is what the table says, in marks that differ without colour, nothing on top."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from safetensors.torch import save_file

from ba_lora.errors import UserError
from ba_lora.experiments.tables import Row
from ba_lora.io import write_jsonl_atomic
from eval.report import figures
from eval.report.block import Figure
from eval.report.columns import ReportColumn
from eval.report.figures import _coinciding, draw_figures, pareto_front
from eval.report.style import styles_of
from eval.report.table import build_table
from tests.support.report_world import SEEDS, World

LONG = {"lora": "LoRA, a rather long name", "pissa": "PiSSA, a rather long name", "dora": "DoRA, another long one"}


@pytest.fixture
def known(tmp_path) -> World:
    world = World(tmp_path)
    world.fill()
    return world


@pytest.fixture
def canvases(monkeypatch) -> list:
    """Every canvas that is drawn, kept for looking at its axes."""
    kept = []
    save = figures.save

    def keep(canvas, title, caption):
        kept.append(canvas)
        return save(canvas, title, caption)

    monkeypatch.setattr(figures, "save", keep)
    return kept


def drawn(world, figure, **changes):
    spec = world.spec(figures=(figure,), **changes)
    sources = world.sources(spec)
    [(one, files)] = draw_figures(build_table(spec, sources), sources)
    return one, files


def overlapping(canvas) -> list[tuple[str, str]]:
    """Return the pairs of texts of a figure (legend, axis labels, tick labels, titles) that lie on each other."""
    renderer = FigureCanvasAgg(canvas).get_renderer()
    canvas.draw(renderer)
    legends = [text for legend in canvas.legends for text in (*legend.get_texts(), legend.get_title())]
    texts = [text for text in (*legends, canvas._supxlabel, canvas._suptitle) if text is not None]
    for axis in canvas.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
        for ticks in (axis.xaxis, axis.yaxis):
            low, high = sorted(ticks.get_view_interval())
            texts += [
                tick.label1
                for tick in ticks.get_major_ticks()
                if low <= tick.get_loc() <= high and tick.label1.get_visible()
            ]
    boxes = [(text, text.get_window_extent(renderer).padded(-1)) for text in texts if text.get_text()]
    assert all(box.x0 > -1 and box.x1 < canvas.bbox.width + 1 for _, box in boxes)  # nothing is cut off
    return [
        (one.get_text(), other.get_text())
        for (one, first), (other, second) in itertools.combinations(boxes, 2)
        if first.overlaps(second) and not (one.get_rotation() == other.get_rotation() == 30)  # slanted ones lie apart
    ]


def test_dots_are_means_with_their_interval_the_seeds_and_the_papers_marks(known, canvases):
    one, files = drawn(known, Figure("a", "dots", ("gsm8k",), caption="Ten items."))
    assert one.missing is None
    assert one.caption == (
        "Ten items. n = 2 to 3 seeds. Lines: 95 % confidence interval of the mean over seeds (t), cut at the panel's "
        "edge; strokes: the seeds. Hollow: the paper (paper, table 1)."
    )
    [axis] = canvases[0].axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["Full FT", "lora", "PiSSA", "BA-LoRA"]
    intervals = [line for line in axis.lines if line.get_linestyle() == "-"]
    half = 4.30265 * 5.7735027 / 3**0.5  # t of 2 degrees of freedom
    assert [np.ptp(line.get_xdata()) for line in intervals] == pytest.approx(
        [0, 2 * half, 2 * half, 2 * half], rel=1e-4
    )
    means = [line for line in axis.lines if line.get_marker() in "osv^"]
    assert [line.get_xdata()[0] for line in means] == pytest.approx([70, 100 / 3, 200 / 3, 200 / 3])
    assert len({line.get_marker() for line in means}) == len({line.get_color() for line in means}) == 4
    seeds = [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "|"]
    assert seeds[1] == [30, 30, 40]
    marks = [line for line in axis.lines if line.get_marker() == "D"]
    assert [mark.get_xdata()[0] for mark in marks] == [34.33, 66.17]
    assert {mark.get_markerfacecolor() for mark in marks} == {"none"}
    low, high = axis.get_xlim()
    assert low < 30 and 70 < high < 80  # wide intervals do not set the scale


def test_a_method_looks_the_same_in_all_figures(known, canvases):
    """Whatever else a figure shows, and in whatever order."""
    drawn(known, Figure("a", "scatter", ("gsm8k",), x="hours"))
    drawn(known, Figure("a", "scatter", ("gsm8k",), x="hours", methods=("ba_lora", "lora")))
    drawn(known, Figure("a", "dots", ("gsm8k",), methods=("ba_lora", "pissa", "lora")))
    looks = []
    for canvas in canvases:
        found = {}
        for line in canvas.axes[0].lines:
            if line.get_marker() in "osv^" and len(line.get_xdata()) == 1:
                found[round(float(max(line.get_xdata()[0], line.get_ydata()[0])), 3)] = (
                    line.get_marker(), line.get_color(),
                )  # fmt: skip
        looks.append(found)
    assert looks[0][33.333] == looks[1][33.333] == ("o", "#0072B2")
    names = [("lora",), ("mine",), ("pissa",), ("ba_lora",)]
    styles = styles_of(names)
    assert styles[("lora",)] == styles_of(names[::-1])[("lora",)] and len(set(styles.values())) == 4


def test_rows_on_one_point_are_said_to_be(known, canvases):
    """PiSSA and BA-LoRA are alike in the known table; LoRA is not."""
    one, _ = drawn(known, Figure("a", "scatter", ("gsm8k",), x="hours", methods=("lora", "pissa", "ba_lora")))
    assert one.caption.endswith("Rows on one point, drawn as the first of them: PiSSA, BA-LoRA.")
    [axis] = canvases[0].axes
    assert [text.get_text() for text in axis.texts] == ["2×"]
    assert [text.get_text() for text in canvases[0].legends[0].get_texts()][:2] == ["lora", "PiSSA"]
    for method, offset in (("lora", 0.0), ("pissa", 5.0), ("ba_lora", 5.01)):
        steps = [{"step": step, "loss": step + offset} for step in (10, 20, 30)]
        write_jsonl_atomic(known.run(method, 1).run_path / "log.jsonl", steps)
    one, _ = drawn(known, Figure("a", "training", terms=("loss",), methods=("lora", "pissa", "ba_lora")))
    assert "Curves on each other: loss, PiSSA, BA-LoRA." in one.caption


def test_a_row_that_stands_alone_is_left_out(known, canvases):
    """Such as a repetition of one method by another engine, in a block of its own."""
    for seed in SEEDS:
        known.add("ba_lora", seed, setting="vLLM")
        for method in ("lora", "ba_lora"):
            known.add(method, seed, setting="hf")
    rows = (Row("tiny", "lora", "hf"), Row("tiny", "ba_lora", "hf"), Row("tiny", "ba_lora", "vLLM"))
    columns = (ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict"),)
    runs = {(row, "gsm8k"): tuple(known.run(row.method, seed, setting=row.setting) for seed in SEEDS) for row in rows}
    parts = {"rows": rows, "columns": columns, "runs": runs, "compare_within": ("base", "setting"), "paper": ()}
    drawn(known, Figure("a", "dots", ("gsm8k",)), **parts)
    assert [axis.get_title() for axis in canvases[0].axes] == ["tiny, hf"]


def test_png_and_pdf_are_whole_and_repeatable(known, tmp_path):
    _, files = drawn(known, Figure("a", "dots", ("gsm8k", "hours")))
    (tmp_path / "a.png").write_bytes(files["png"])
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 800 and len(set(image.convert("L").getdata())) > 10
    assert files["pdf"].startswith(b"%PDF") and b"/Type3" not in files["pdf"] and b"/FontFile2" in files["pdf"]
    assert drawn(known, Figure("a", "dots", ("gsm8k", "hours")))[1] == files


def test_lines_over_the_setting_with_a_level_for_what_has_none(known, canvases):
    rows = [Row("tiny", method, f"rank={rank}") for method in ("lora", "ba_lora") for rank in (1, 2, 16)]
    rows.append(Row("tiny", "full_ft"))
    for row in rows[:-1]:
        for seed in SEEDS:
            known.add(row.method, seed, setting=row.setting)
    column = ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict", paper=("gsm8k", "accuracy"))
    runs = {(row, "gsm8k"): tuple(known.run(row.method, seed, setting=row.setting) for seed in SEEDS) for row in rows}
    one, _ = drawn(
        known, Figure("a", "lines", ("gsm8k",), x="rank", log_x=True), rows=tuple(rows), columns=(column,), runs=runs
    )
    assert one.missing is None
    [axis] = canvases[0].axes
    assert axis.get_xscale() == "log" and list(axis.get_xticks()) == [1, 2, 16]
    curves = [line for line in axis.lines if len(line.get_xdata()) == 3 and line.get_linestyle() != "None"]  # no caps
    assert [list(line.get_xdata()) for line in curves] == [[1, 2, 16]] * 2
    assert [line.get_ydata()[0] for line in curves] == pytest.approx([100 / 3, 200 / 3])
    assert len({line.get_marker() for line in curves}) == len({line.get_linestyle() for line in curves}) == 2
    assert any(list(line.get_ydata()) == [70, 70] for line in axis.lines)  # full fine-tuning
    assert [handle.get_marker() for handle in canvases[0].legends[0].legend_handles] == ["o", "^", ""]
    assert not overlapping(canvases[0])


def test_a_logarithmic_axis_has_room_for_zero(known, canvases):
    rows = [Row("tiny", "ba_lora", f"lambda_svd={value}") for value in ("0", "1e-4", "1e-2")]
    for row in rows:
        known.add(row.method, 1, setting=row.setting)
    columns = (ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict"),)
    runs = {(row, "gsm8k"): (known.run(row.method, 1, setting=row.setting),) for row in rows}
    figure = Figure("a", "lines", ("gsm8k",), x="lambda_svd", log_x=True)
    one, _ = drawn(known, figure, rows=tuple(rows), columns=columns, runs=runs)
    assert one.caption == "n = 1 seed."  # and no word of error bars
    [axis] = canvases[0].axes
    assert list(axis.get_xticks()) == [0, 1e-4, 1e-2]
    shown = axis.transData.transform([(tick, 0) for tick in axis.get_xticks()])[:, 0]
    assert (shown[1:] - shown[:-1] > 20).all()


def test_lines_show_one_of_several_settings(known, canvases):
    """Of a sweep over two weights each has a figure of its own; the other's rows are neither points nor levels."""
    rows = [Row("tiny", "ba_lora", name) for name in ("lambda_svd=1", "lambda_svd=2", "lambda_consistency=3")]
    for row in rows:
        known.add(row.method, 1, setting=row.setting)
    columns = (ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict"),)
    runs = {(row, "gsm8k"): (known.run(row.method, 1, setting=row.setting),) for row in rows}
    sweep = {"rows": tuple(rows), "columns": columns, "runs": runs}
    drawn(known, Figure("a", "lines", ("gsm8k",), x="lambda_svd"), **sweep)
    [axis] = canvases[0].axes
    assert {tuple(line.get_xdata()) for line in axis.lines} == {(1, 2)}
    one, _ = drawn(known, Figure("a", "lines", ("gsm8k",), x="lambda_diversity"), **sweep)
    assert one.missing == "no setting gives lambda_diversity a number"


def test_a_papers_bound_is_no_point(known, canvases):
    (known.folder / "paper" / "known.csv").write_text(
        "table,model,method,setting,task,metric,mean,std,source\n"
        'known,tiny,ba_lora,rank=1,gsm8k,"accuracy, more than",99,,text\n'
        'known,tiny,full_ft,,gsm8k,"accuracy, more than",98,,text\n'
    )
    rows = [Row("tiny", "ba_lora", "rank=1"), Row("tiny", "full_ft")]
    columns = (ReportColumn("gsm8k", "GSM8K", task="gsm8k", metric="strict", paper=("gsm8k", "accuracy")),)
    runs = {(row, "gsm8k"): (known.add(row.method, 1, setting=row.setting),) for row in rows}
    one, _ = drawn(known, Figure("a", "lines", ("gsm8k",), x="rank"), rows=tuple(rows), columns=columns, runs=runs)
    assert one.caption == "n = 1 seed."
    [axis] = canvases[0].axes
    assert not any(y > 90 for line in axis.lines for y in line.get_ydata())
    assert "paper (hollow)" not in [text.get_text() for text in canvases[0].legends[0].get_texts()]


def test_scatter_joins_the_pareto_front(known, canvases):
    one, _ = drawn(known, Figure("a", "scatter", ("gsm8k",), x="hours", methods=("lora", "pissa", "full_ft")))
    assert one.missing is None
    [axis] = canvases[0].axes
    [front] = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert list(front.get_xdata()) == [2.0, 3.0]  # full FT and PiSSA cost the same; full FT is better
    assert list(front.get_ydata()) == pytest.approx([100 / 3, 70])


def test_a_scatter_may_have_a_logarithmic_axis(known, canvases):
    for log_x in (False, True):
        drawn(known, Figure("a", "scatter", ("gsm8k",), x="hours", log_x=log_x, methods=("lora", "pissa", "full_ft")))
    assert [canvas.axes[0].get_xscale() for canvas in canvases] == ["linear", "log"]
    for seed in SEEDS:
        known.add("lora", seed, training={"seconds": 0.0, "trainable_parameters": 1})
    one, _ = drawn(
        known, Figure("a", "scatter", ("gsm8k",), x="hours", log_x=True, methods=("lora", "pissa", "full_ft"))
    )
    assert "Not above 0, so not drawn: lora." in one.caption
    near, far = Row("tiny", "lora"), Row("tiny", "pissa")
    points = {near: (1.0, 5.0), far: (2.0, 5.0), Row("tiny", "full_ft"): (1000.0, 9.0)}
    assert len(_coinciding(points, log_x=False)) == 2 and len(_coinciding(points, log_x=True)) == 3


def test_the_legend_names_a_pareto_front_that_is_drawn(known, canvases):
    drawn(known, Figure("a", "scatter", ("gsm8k",), x="hours", methods=("lora", "full_ft")))
    drawn(known, Figure("a", "scatter", ("gsm8k",), x="hours", methods=("pissa", "full_ft")))
    for canvas, has_front in zip(canvases, (True, False), strict=True):  # PiSSA costs what full FT does and is worse
        [axis] = canvas.axes
        assert ("--" in [line.get_linestyle() for line in axis.lines]) == has_front
        assert ("Pareto front" in [text.get_text() for text in canvas.legends[0].get_texts()]) == has_front


def test_a_row_alone_has_no_panel_in_a_scatter(known, canvases):
    known.add("pissa", 1, base="other")
    rows = [Row("tiny", "lora"), Row("tiny", "pissa"), Row("other", "pissa")]
    seeds = {"tiny": SEEDS, "other": (1,)}
    runs = {
        (row, name): tuple(known.run(row.method, seed, base=row.base) for seed in seeds[row.base])
        for row in rows
        for name in ("gsm8k", "hours")
    }
    figure = Figure("a", "scatter", ("gsm8k",), x="hours")
    one, _ = drawn(known, figure, rows=tuple(rows), runs=runs)
    assert [axis.get_title() for axis in canvases[0].axes] == ["tiny"] and one.caption.startswith("n = 3 seeds.")
    one, files = drawn(known, figure, rows=tuple(rows[1:]), runs=runs)
    assert (one.missing, files) == ("no two rows to compare have values yet", {})


@pytest.mark.parametrize(
    ("points", "better", "front"),
    [
        ([(1, 1), (2, 2), (3, 1), (2, 1)], ("lower", "higher"), [(1, 1), (2, 2)]),
        ([(1, 1), (2, 2), (3, 1), (3, 2)], ("higher", "higher"), [(3, 2)]),
        ([(1, 1), (2, 0.5), (3, 2)], ("lower", "lower"), [(1, 1), (2, 0.5)]),
        ([(1, 1), (1, 1)], ("lower", "higher"), [(1, 1), (1, 1)]),
        ([], ("lower", "higher"), []),
    ],
)
def test_pareto_front(points, better, front):
    assert pareto_front(points, better=better) == front


def test_training_curves_are_means_over_seeds_at_common_steps(known, canvases):
    for seed, offset in zip(SEEDS, (0.0, 1.0, 2.0), strict=True):
        steps = [{"step": step, "loss": step + offset, "svd": -1.0} for step in (10, 20, 30)]
        last = [{"step": 40, "loss": 0.0}] if seed == 1 else []  # a step that the others did not log
        write_jsonl_atomic(known.run("lora", seed).run_path / "log.jsonl", [*steps, *last, {"step": 40, "runtime": 1}])
    one, _ = drawn(known, Figure("a", "training", terms=("loss", "svd"), methods=("lora", "pissa")))
    assert one.caption == "n = 3 seeds. Lines: mean over seeds of what training logged; bands: standard deviation."
    loss, svd = canvases[0].axes
    assert list(loss.lines[0].get_xdata()) == [10, 20, 30] and list(loss.lines[0].get_ydata()) == [11, 21, 31]
    band = loss.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (10, 32)  # one deviation of 0, 1, 2 on either side
    assert len(svd.lines) == 1 and svd.get_ylabel() == "svd"
    terms = ("loss (nats)", "consistency (nats)", "weighted_svd")
    one, _ = drawn(known, Figure("a", "training", terms=terms, methods=("lora", "pissa")))
    assert one.caption.endswith(" standard deviation. Not logged: consistency, weighted_svd.")
    [loss] = canvases[1].axes  # no run has the other terms
    assert loss.get_ylabel() == "loss (nats)" and list(loss.lines[0].get_xdata()) == [10, 20, 30]
    one, _ = drawn(known, Figure("a", "training", terms=("consistency",)))
    assert one.missing == "no run has logged any of its terms"


def test_a_term_that_was_taken_out_of_the_loss_is_not_logged(known, canvases):
    """A classifier's log says "off" there, which is no number to draw."""
    write_jsonl_atomic(known.run("lora", 1).run_path / "log.jsonl", [{"step": 10, "loss": 1.0, "diversity": "off"}])
    one, _ = drawn(known, Figure("a", "training", terms=("loss", "diversity"), methods=("lora",)))
    assert len(canvases[0].axes) == 1 and one.caption.endswith("Not logged: diversity.")


def test_curves_of_several_trainings_are_not_averaged(known, canvases):
    """Columns trained on different sets are different runs of a row: the figure names those of one set."""
    rows = (Row("tiny", "lora"),)
    columns = tuple(ReportColumn(name, name, task=name, metric="strict") for name in ("gsm8k", "mbpp"))
    runs = {
        (rows[0], name): tuple(known.run("lora", seed, setting=name) for seed in (1, 2)) for name in ("gsm8k", "mbpp")
    }
    for name, loss in (("gsm8k", 1.0), ("mbpp", 5.0)):
        for seed in (1, 2):
            log = known.run("lora", seed, setting=name).run_path / "log.jsonl"
            write_jsonl_atomic(log, [{"step": 10, "loss": loss + seed}])
    tables = {"rows": rows, "columns": columns, "runs": runs}
    with pytest.raises(UserError, match="figure a: tiny lora has several trainings: name columns"):
        drawn(known, Figure("a", "training", terms=("loss",)), **tables)
    one, _ = drawn(known, Figure("a", "training", columns=("gsm8k",), terms=("loss",)), **tables)
    assert one.caption.startswith("n = 2 seeds.")
    assert list(canvases[0].axes[0].lines[0].get_ydata()) == [2.5]


def test_features_are_rows_of_the_first_seed_that_has_some(known, canvases):
    labels = torch.arange(12) % 2
    for method, seed in (("lora", 2), ("lora", 3), ("ba_lora", 1)):
        folder = known.run(method, seed).run_path / "features"
        folder.mkdir(parents=True)
        for step in (0, 10):
            points = torch.randn(12, 4, generator=torch.Generator().manual_seed(step)) + 5.0 * labels[:, None]
            save_file({"features": points, "labels": labels}, folder / f"step-{step}.safetensors")
    one, files = drawn(known, Figure("a", "features", title="Features"))
    assert one.caption.startswith("One run each, seed 2, 1. t-SNE") and files["png"] and files["pdf"]
    assert [axis.get_ylabel() for axis in canvases[0].axes] == ["tiny, lora", "", "tiny, BA-LoRA", ""]
    assert [axis.get_title() for axis in canvases[0].axes] == ["step 0", "step 10", "", ""]
    assert not overlapping(canvases[0])
    (known.run("lora", 2).run_path / "features" / "step-0.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="step-0.safetensors is damaged or cut short"):
        drawn(known, Figure("a", "features"))


def test_what_cannot_be_drawn_says_why(tmp_path, known):
    one, files = drawn(known, Figure("a", "training", terms=("loss",)))
    assert (one.missing, files) == ("no run's log.jsonl is at hand", {})
    assert drawn(known, Figure("a", "features"))[0].missing == "no run's features are at hand"
    one, files = drawn(known, Figure("a", "dots", ("gsm8k",), methods=("loha",)))
    assert (one.missing, files) == ("no row has a value yet", {})


@pytest.mark.parametrize(
    "figure",
    [
        Figure("a", "dots", ("gsm8k", "average", "hours")),
        Figure("a", "scatter", ("gsm8k", "average"), x="hours", title="A title that is long enough to be broken " * 3),
    ],
)
def test_no_text_lies_on_another(known, canvases, figure):
    for base in ("llama-2-7b", "mistral-7b"):
        for method in LONG:
            for seed in SEEDS:
                known.add(method, seed, base=base)
    rows = [Row(base, method) for base in ("llama-2-7b", "mistral-7b") for method in LONG]
    columns = known.spec().columns
    runs = {
        (row, column.name): tuple(known.run(row.method, seed, base=row.base) for seed in SEEDS)
        for row in rows
        for column in columns
        if column.metric
    }
    one, _ = drawn(known, figure, rows=tuple(rows), runs=runs, labels=LONG)
    assert one.missing is None and overlapping(canvases[0]) == []
