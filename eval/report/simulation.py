"""How often the comparison of two rows is wrong: it is simulated, not believed.

    python -m eval.report.simulation --output docs

draws made-up experiments, two methods with S seeds each on N items, and counts how often each test calls their
difference real: without any ("false marks", to be 5 % at most) and with a planted one ("found"). Beside the test of
crossed.py stand its paired form, where the seed moves both methods alike, and what an earlier report marked: items
only as random, and one sign in all seeds. Written are statistics.png and statistics.json; docs/statistics.md shows
them.

An item's chance to be solved differs from item to item, a little between the methods, and by the seed: sd 0, 1 or 4
points. Of the metrics that are no mean over items F1, Matthews, Spearman and perplexity are simulated, each of
predictions that such chances give, by the jackknife's pseudo-values.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ba_lora.errors import CommandParser, run_entry_point
from ba_lora.io import write_bytes_atomic, write_json_atomic
from eval.metrics.bootstrap import WEIGHTED
from eval.report.crossed import Array, crossed_t, pseudo_values
from eval.report.paired import perplexity
from eval.report.stats import SIGNIFICANT

SEED_SDS = (0.0, 1.0, 4.0)  # points
NUM_SEEDS = (3, 5, 10)
NUM_ITEMS = 400
NUM_RANKED = 100  # items of Spearman's, whose pseudo-values take long
EFFECT = 10.0  # points, of the planted difference
METRICS = ("accuracy", "f1", "matthews", "spearman", "perplexity")

Experiment = tuple[Array, Array]  # each method's values, [S, N]


def draw_experiment(
    random: np.random.Generator,
    *,
    num_seeds: int,
    seed_sd: float,
    effect: float = 0.0,
    metric: str = "accuracy",
    paired: bool = False,
) -> Experiment:
    """Return one experiment: both methods' values of every item in every seed; sd and effect in points.

    paired: a seed moves both methods alike.
    """
    both_S1 = random.normal(0, seed_sd / 100, (num_seeds, 1))
    num_items = NUM_RANKED if metric == "spearman" else NUM_ITEMS
    shared_N = random.beta(2.0, 2.0, num_items)  # how easy an item is
    labels_N = random.integers(0, 2, num_items)
    scores_N, lengths_N = random.normal(size=num_items), random.integers(10, 60, num_items)
    methods = []
    for shift in (effect / 100, 0.0):
        own_N = shared_N + random.normal(0, 0.05, num_items)
        seeds_S1 = both_S1 if paired else random.normal(0, seed_sd / 100, (num_seeds, 1))
        chance_SN = np.clip(own_N + seeds_S1 + shift, 0, 1)
        if metric == "perplexity":
            nll_SN = lengths_N * np.exp(random.normal(0, 0.1, chance_SN.shape) - chance_SN)
            methods.append(np.stack([pseudo_values(perplexity, lengths_N, nll_N) for nll_N in nll_SN]))
        elif metric == "spearman":
            noise_SN = random.normal(0, 1.5 - chance_SN)
            methods.append(np.stack([pseudo_values(WEIGHTED[metric], scores_N, scores_N + one) for one in noise_SN]))
        else:
            right_SN = random.random(chance_SN.shape) < chance_SN
            guesses_SN = np.where(right_SN, labels_N, 1 - labels_N)
            of_metric = WEIGHTED[metric]
            methods.append(
                right_SN.astype(np.float64)
                if metric == "accuracy"
                else np.stack([pseudo_values(of_metric, labels_N, guesses_N) for guesses_N in guesses_SN])
            )
    return methods[0], methods[1]


def crossed_mark(experiment: Experiment) -> bool:
    """Whether the test of crossed.py calls the difference real."""
    return crossed_t([experiment]).p < SIGNIFICANT


def paired_mark(experiment: Experiment) -> bool:
    """Whether its paired form does."""
    return crossed_t([experiment], paired=True).p < SIGNIFICANT


def items_alone_mark(experiment: Experiment) -> bool:
    """Whether the earlier rule does: p over items below 0.05 with these very models, and one sign in all seeds."""
    ours, theirs = experiment
    difference_N = ours.mean(axis=0) - theirs.mean(axis=0)
    is_far = abs(difference_N.mean()) > 1.96 * difference_N.std(ddof=1) / np.sqrt(NUM_ITEMS)
    by_seed = ours.mean(axis=1) - theirs.mean(axis=1)
    return bool(is_far and len(set(np.sign(by_seed))) == 1)


def share(marks: Callable[[Experiment], bool], *, repeats: int, random: int = 0, **settings) -> float:
    """Return the share of experiments that are marked; see `draw_experiment` for the settings."""
    generator = np.random.default_rng(random)
    return sum(marks(draw_experiment(generator, **settings)) for _ in range(repeats)) / repeats


def table(repeats: int) -> list[dict]:
    """Return one line a metric, number of seeds and sd: the shares of false marks and of found effects."""
    lines = []
    for metric in METRICS:
        times = 1 if metric == "accuracy" else 4  # pseudo-values take longer
        for num_seeds in NUM_SEEDS:
            for seed_sd in SEED_SDS:
                settings = {"num_seeds": num_seeds, "seed_sd": seed_sd, "metric": metric, "repeats": repeats // times}
                line = settings | {"false": share(crossed_mark, **settings)}
                if metric == "accuracy":
                    line |= {
                        "found": share(crossed_mark, effect=EFFECT, **settings),
                        "false_items_alone": share(items_alone_mark, **settings),
                        "found_items_alone": share(items_alone_mark, effect=EFFECT, **settings),
                        "false_paired": share(paired_mark, paired=True, **settings),
                        "found_paired": share(paired_mark, paired=True, effect=EFFECT, **settings),
                    }
                lines.append(line)
    return lines


def figure(lines: Sequence[dict]) -> bytes:
    """Return the figure, as PNG: false marks and found effects over the number of seeds."""
    import matplotlib
    from matplotlib.lines import Line2D

    from eval.report.style import RC, add_legend, as_files, line_handle, panel_grid, style_of

    with matplotlib.rc_context(RC):
        canvas, axes = panel_grid(3, across=3)
        of_accuracy = [line for line in lines if line["metric"] == "accuracy"]
        rules = {"": "seeds and items (this report)", "_items_alone": "items alone, one sign (before)"}
        for axis, key in zip(axes, ("false", "found"), strict=False):
            for position, suffix in enumerate(rules):
                style = style_of(position)
                for seed_sd, line_style in zip(SEED_SDS, (":", "--", "-"), strict=True):
                    found = [line for line in of_accuracy if line["seed_sd"] == seed_sd]
                    x, y = [line["num_seeds"] for line in found], [100 * line[key + suffix] for line in found]
                    axis.plot(x, y, color=style.colour, marker=style.marker, ls=line_style)
            axis.set_ylabel(f"{'false marks' if key == 'false' else f'{EFFECT:g} points found'} (%), accuracy")
        handles = [line_handle(style_of(position), label) for position, label in enumerate(rules.values())]
        for seed_sd, line_style in zip(SEED_SDS, (":", "--", "-"), strict=True):
            label = f"seed sd {seed_sd:g}{' points' if seed_sd != 1 else ' point'} (left, middle)"
            handles.append(Line2D([], [], color="0.3", ls=line_style, label=label))
        for position, metric in enumerate(METRICS[1:], start=2):
            style = style_of(position)
            worst = [
                100 * max(line["false"] for line in lines if (line["metric"], line["num_seeds"]) == (metric, num_seeds))
                for num_seeds in NUM_SEEDS
            ]
            axes[2].plot(NUM_SEEDS, worst, color=style.colour, marker=style.marker, ls=style.line)
            handles.append(line_handle(style, f"{metric} (right)"))
        axes[2].set_ylabel("false marks (%), worst sd")
        for axis in axes:
            axis.set_xlabel("seeds")
            axis.set_xticks(NUM_SEEDS)
            axis.set_xlim(2.5, 11.5)
            axis.set_ylim(bottom=0)
        for axis in (axes[0], axes[2]):
            axis.axhline(100 * SIGNIFICANT, color="0.5", lw=0.8)
        axes[2].set_ylim(0, 10)
        add_legend(canvas, handles)
        return as_files(canvas)["png"]


def main() -> int:
    """The command line; see the module."""
    parser = CommandParser(
        prog="python -m eval.report.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2000)
    options = parser.parse_args()
    lines = table(options.repeats)
    write_json_atomic(options.output / "statistics.json", {"repeats": options.repeats, "lines": lines})
    write_bytes_atomic(options.output / "statistics.png", figure(lines))
    for line in lines:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()})
    return 0


if __name__ == "__main__":
    run_entry_point(main)
