"""What a classifier's features look like while it is tuned: t-SNE over steps, silhouette and effective rank.

    python -m eval.report.features RUN_DIR [RUN_DIR …] --output DIR

A run's folder holds features/step-<n>.safetensors (`features` [N, hidden], the pooled last hidden states of dev rows;
`labels` [N]), saved where features.steps asks for it. DIR gets features.png, features.pdf (a row for each run, a column
for each step; PAPER: figures 1 and 5 to 8) and features.json, the numbers.

t-SNE is scikit-learn's with seed 42, as in the paper; it is only a picture. Both numbers are of the features
themselves, not of the drawing:
  silhouette      Rousseeuw 1987, mean over rows, Euclidean distance (the one t-SNE uses), from −1 to 1; undefined for
                  only one class and for scores
  effective rank  Roy & Vetterli 2007: exp of the entropy of the singular values of [N, hidden], normalised to sum 1;
                  the features are not centred
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ba_lora.config.checks import check_place
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.io import load_tensors, read_json, write_bytes_atomic, write_json_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TSNE_SEED = 42
MIN_ROWS = 5
PANEL_SIZE = 1.9  # inches
# Readable in grey: dark, light, hollow; and each class has a marker of its own.
CLASS_STYLES = (
    {"marker": "o", "facecolors": "#0b3c68", "linewidths": 0},
    {"marker": "^", "facecolors": "#f0b030", "linewidths": 0},
    {"marker": "s", "facecolors": "none", "edgecolors": "#202020", "linewidths": 0.5},
)
RC = {"font.size": 7, "axes.titlesize": 8, "pdf.fonttype": 42}  # 42: letters stay letters


@dataclass(frozen=True)
class Features:
    """One saved step of a run: features [N, hidden] in float64; labels [N], class ids (integers) or scores."""

    step: int
    features: np.ndarray
    labels: np.ndarray

    @property
    def are_classes(self) -> bool:
        """Whether the labels are class ids and not scores."""
        return np.issubdtype(self.labels.dtype, np.integer)


@dataclass(frozen=True)
class RunFeatures:
    """A run's name in the figure, its class names (empty: not known, or scores) and its steps in order."""

    name: str
    classes: tuple[str, ...]
    steps: list[Features]


def read_runs(folders: Sequence[Path]) -> list[RunFeatures]:
    """Return the runs, each called by its method, by its folder where methods repeat, by its path where these do."""
    choices = [[_method(folder) for folder in folders], [folder.resolve().name for folder in folders]]
    paths = [str(folder) for folder in folders]
    names = next((names for names in choices if len(set(names)) == len(names)), paths)
    return [
        RunFeatures(name, _class_names(folder), read_steps(folder)) for folder, name in zip(folders, names, strict=True)
    ]


def read_steps(folder: Path) -> list[Features]:
    """Return the saved steps of a run, in order. Raises UserError where there are none, or they are damaged."""
    found = {}
    for path in (folder / "features").glob("step-*.safetensors"):
        if match := re.fullmatch(r"step-(\d+)", path.stem):
            found[int(match[1])] = path
    if not found:
        raise UserError(f"{folder} has no features/step-*.safetensors: train with features.steps=[0,100,…]")
    return [_read_step(step, found[step]) for step in sorted(found)]


def _read_step(step: int, path: Path) -> Features:
    tensors = load_tensors(path)
    missing = [name for name in ("features", "labels") if name not in tensors]
    if missing:
        raise UserError(f"{path} lacks {' and '.join(missing)}; found: {', '.join(tensors) or 'none'}; train again")
    features, labels = tensors["features"].double().numpy(), tensors["labels"].numpy()
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise UserError(
            f"{path}: features {list(features.shape)} and labels {list(labels.shape)}: [N, hidden] and [N] are needed"
        )
    if len(labels) < MIN_ROWS:
        raise UserError(
            f"{path} has {len(labels)} rows, at least {MIN_ROWS} are needed: use a larger dev set, or features.num_rows"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{path}: features are NaN or infinite: the training has diverged")
    return Features(step, features, labels)


def _method(folder: Path) -> str:
    config = folder / "config.yaml"
    if not config.is_file():
        return folder.resolve().name
    from omegaconf import OmegaConf

    return OmegaConf.load(config).get("method") or folder.resolve().name


def _class_names(folder: Path) -> tuple[str, ...]:
    exported = folder / "merged" / "config.json"
    names = read_json(exported).get("id2label", {}) if exported.is_file() else {}
    return tuple(names[key] for key in sorted(names, key=int))


def silhouette(step: Features) -> float | None:
    """Return the mean silhouette of the classes in feature space; None where it is undefined."""
    from sklearn.metrics import silhouette_score

    num_classes = len(np.unique(step.labels))
    if not step.are_classes or not 1 < num_classes < len(step.labels):
        return None
    return float(silhouette_score(step.features, step.labels, metric="euclidean"))


def effective_rank(features_ND: np.ndarray) -> float:
    """Return exp(−Σ p log p) for p = σ / Σ σ, between 1 and min(N, D). Raises UserError where all features are 0."""
    sigma = np.linalg.svd(features_ND, compute_uv=False)
    if sigma.sum() == 0:
        raise UserError("all features are 0: their effective rank is undefined")
    p = sigma / sigma.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def embed(features_ND: np.ndarray) -> np.ndarray:
    """Return the t-SNE of the rows, [N, 2]; the perplexity is scikit-learn's 30, less for fewer than 91 rows."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features_ND) - 1) / 3)
    return TSNE(n_components=2, random_state=TSNE_SEED, perplexity=perplexity).fit_transform(features_ND)


def measure(runs: Sequence[RunFeatures]) -> list[dict]:
    """Return one line a run and step: run, step, n, silhouette, effective_rank."""
    return [
        {
            "run": run.name,
            "step": step.step,
            "n": len(step.labels),
            "silhouette": silhouette(step),
            "effective_rank": effective_rank(step.features),
        }
        for run in runs
        for step in run.steps
    ]


def draw_features(runs: Sequence[RunFeatures], lines: Sequence[dict]) -> "Figure":
    """Return the figure: a row for each run, its steps in columns; see `_in_columns`."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = _in_columns(runs)
    numbers = {(line["run"], line["step"]): line for line in lines}
    with matplotlib.rc_context(RC):
        size = (PANEL_SIZE * len(rows[0]) + 0.3, (PANEL_SIZE + 0.25) * len(runs) + 0.6)
        canvas = Figure(figsize=size, layout="constrained")
        panels = canvas.subplots(len(runs), len(rows[0]), squeeze=False)
        above: list[int | None] = [None] * len(rows[0])
        for run, row, steps in zip(runs, panels, rows, strict=True):
            row[0].set_ylabel(run.name, fontsize=9)
            for place, (axes, (number, step)) in enumerate(zip(row, steps, strict=True)):
                axes.set(xticks=[], yticks=[])
                if number != above[place]:
                    axes.set_title(f"step {number}")
                    above[place] = number
                if step is None:
                    axes.text(0.5, 0.5, "not saved", ha="center", va="center", transform=axes.transAxes, color="0.5")
                    continue
                points = _scatter(axes, step, run.classes)
                axes.set_xlabel(_numbers(numbers[run.name, number]))
        _legend(canvas, panels, points)
        canvas.supxlabel(
            "t-SNE of pooled features (each panel by itself: axes and distances between panels mean nothing). "
            "Silhouette and effective rank are of the features.",
            x=0.01,
            ha="left",
            fontsize=6,
            color="0.3",
            wrap=True,
        )
    return canvas


def _in_columns(runs: Sequence[RunFeatures]) -> list[list[tuple[int, Features | None]]]:
    """Return each run's row of (step, features or None where they were not saved), all of one length.

    Runs that saved equally many steps stand side by side, first with first, although one may have trained for longer;
    else there is a column for each step that some run has.
    """
    if len({len(run.steps) for run in runs}) == 1:
        return [[(step.step, step) for step in run.steps] for run in runs]
    columns = sorted({step.step for run in runs for step in run.steps})
    saved = [{step.step: step for step in run.steps} for run in runs]
    return [[(column, steps.get(column)) for column in columns] for steps in saved]


def _scatter(axes: "Axes", step: Features, classes: Sequence[str]):
    """Draw one panel; return what the colour bar of scores needs, None for classes."""
    points = embed(step.features)
    if not step.are_classes:
        return axes.scatter(*points.T, c=step.labels, cmap="viridis", s=5, linewidths=0)
    for label in np.unique(step.labels):
        name = classes[label] if label < len(classes) else f"class {label}"
        of_class = step.labels == label
        axes.scatter(*points[of_class].T, s=6, alpha=0.8, label=name, **CLASS_STYLES[label % len(CLASS_STYLES)])
    return None


def _legend(canvas: "Figure", panels: np.ndarray, points: object) -> None:
    if points is not None:
        canvas.colorbar(points, ax=panels, label="score", fraction=0.02)
        return
    handles = {}
    for axes in panels.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    canvas.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False, markerscale=2
    )


def _numbers(line: dict) -> str:
    value = line["silhouette"]
    return f"silhouette {'undefined' if value is None else f'{value:.3f}'}, eff. rank {line['effective_rank']:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    import matplotlib

    from eval.report.style import as_files

    parser = CommandParser(
        prog="python -m eval.report.features", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, required=True)
    parsed = parser.parse_args(arguments)
    check_place(parsed.output, "--output")
    runs = read_runs(parsed.runs)
    lines = measure(runs)
    for line in lines:
        print(f"{line['run']} step {line['step']}: {_numbers(line)}, n={line['n']}")
    with matplotlib.rc_context(RC):
        files = as_files(draw_features(runs, lines))
    for kind, content in files.items():
        write_bytes_atomic(parsed.output / f"features.{kind}", content)
    summary = {"tsne_seed": TSNE_SEED, "silhouette_distance": "euclidean", "lines": lines}
    write_json_atomic(parsed.output / "features.json", summary)
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
