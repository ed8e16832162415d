"""eval/report/features.py: numbers by hand, figures from saved steps, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ba_lora.errors import UserError
from eval.report.features import (
    Features,
    draw_features,
    effective_rank,
    embed,
    main,
    measure,
    read_runs,
    read_steps,
    silhouette,
)


def save(folder: Path, step: int, *, spread: float = 1.0, num_rows: int = 60, **replaced: torch.Tensor) -> None:
    """Three classes around three corners, less separate the larger `spread` is."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.arange(num_rows) % 3
    features = 4 * torch.eye(3, 8)[labels] + spread * torch.randn(num_rows, 8, generator=generator)
    (folder / "features").mkdir(parents=True, exist_ok=True)
    tensors = {"features": features, "labels": labels} | replaced
    save_file(tensors, folder / "features" / f"step-{step}.safetensors")


def make_run(folder: Path, method: str | None = None, *, steps: tuple[int, ...] = (0, 20, 100)) -> Path:
    for number, step in enumerate(steps):
        save(folder, step, spread=3.0 / (number + 1))
    if method:
        (folder / "config.yaml").write_text(f"method: {method}\n")
        (folder / "merged").mkdir()
        names = {"id2label": {"0": "entailment", "1": "neutral", "2": "contradiction"}}
        (folder / "merged" / "config.json").write_text(json.dumps(names))
    return folder


def test_effective_rank_by_hand() -> None:
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.outer(np.arange(1, 6), np.ones(4))) == pytest.approx(1)
    p = np.array([0.75, 0.25])  # singular values 3 and 1
    assert effective_rank(np.diag([3.0, 1.0])) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert effective_rank(10 * np.diag([3.0, 1.0])) == pytest.approx(effective_rank(np.diag([3.0, 1.0])))
    with pytest.raises(UserError, match="all features are 0"):
        effective_rank(np.zeros((3, 2)))


def test_silhouette_by_hand() -> None:
    """Points 0, 1 | 4, 6: a = 1, 1, 2, 2 and b = 5, 4, 3.5, 5.5."""
    step = Features(0, np.array([[0.0], [1.0], [4.0], [6.0]]), np.array([0, 0, 1, 1]))
    assert silhouette(step) == pytest.approx(np.mean([4 / 5, 3 / 4, 1.5 / 3.5, 3.5 / 5.5]))
    assert silhouette(Features(0, step.features, np.array([1, 1, 1, 1]))) is None  # one class
    assert silhouette(Features(0, step.features, np.array([0, 1, 2, 3]))) is None  # every row its own
    assert silhouette(Features(0, step.features, np.array([0.5, 1.0, 1.0, 2.0]))) is None  # scores


def test_the_embedding_is_seeded() -> None:
    features = np.random.default_rng(0).normal(size=(40, 5))
    assert embed(features).shape == (40, 2)
    assert np.array_equal(embed(features), embed(features))


def test_numbers_follow_the_separation(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "run", "lora")])
    lines = measure([run])
    assert [line["step"] for line in lines] == [0, 20, 100]  # in the order of numbers, not of names
    assert lines[0]["silhouette"] < lines[1]["silhouette"] < lines[2]["silhouette"]
    assert all(1 < line["effective_rank"] <= 8 for line in lines) and {line["n"] for line in lines} == {60}
    assert run.classes == ("entailment", "neutral", "contradiction")


def test_figure_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = [make_run(tmp_path / "a", "lora"), make_run(tmp_path / "b", "ba_lora", steps=(0, 100))]
    output = tmp_path / "figures"
    assert main([str(folder) for folder in folders] + ["--output", str(output)]) == 0
    png, pdf = (output / "features.png").read_bytes(), (output / "features.pdf").read_bytes()
    assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF")
    assert b"/Type3" not in pdf and b"/FontFile2" in pdf  # letters stay letters
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == json.loads((output / "features.json").read_text())
    assert [(line["run"], line["step"]) for line in summary["lines"]] == [
        *[("lora", step) for step in (0, 20, 100)],
        *[("ba_lora", step) for step in (0, 100)],
    ]
    main([str(folder) for folder in folders] + ["--output", str(output)])
    assert (output / "features.png").read_bytes() == png  # the same features, the same file
    assert (output / "features.pdf").read_bytes() == pdf


def test_panels_and_legend(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a", "lora", steps=(0, 20)), make_run(tmp_path / "b", "pissa", steps=(0,))])
    lines = measure(runs)
    canvas = draw_features(runs, lines)
    panels = canvas.axes
    assert len(panels) == 4
    assert [panel.get_title() for panel in panels[:2]] == ["step 0", "step 20"]
    assert [panels[0].get_ylabel(), panels[2].get_ylabel()] == ["lora", "pissa"]
    assert f"silhouette {lines[0]['silhouette']:.3f}" in panels[0].get_xlabel()
    assert panels[3].texts[0].get_text() == "not saved"
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["entailment", "neutral", "contradiction"]
    markers = {collection.get_paths()[0].vertices.tobytes() for collection in panels[0].collections}
    assert len(markers) == 3  # readable without colour


def test_runs_of_one_method_are_told_by_their_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"lora-s{seed}", "lora", steps=(0,)) for seed in (1, 2)]
    assert [run.name for run in read_runs(folders)] == ["lora-s1", "lora-s2"]
    alike = [make_run(tmp_path / machine / "lora-s1", "lora", steps=(0,)) for machine in ("a", "b")]
    assert [run.name for run in read_runs(alike)] == [str(folder) for folder in alike]


def test_scores_are_a_scale(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "stsb", steps=())
    save(folder, 0, labels=torch.linspace(0, 5, 60))
    runs = read_runs([folder])
    lines = measure(runs)
    assert lines[0]["silhouette"] is None
    canvas = draw_features(runs, lines)
    assert not canvas.legends and canvas.axes[-1].get_ylabel() == "score"


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"features": torch.full((60, 8), float("nan"))}, "features are NaN or infinite"),
        ({"labels": torch.zeros(59, dtype=torch.long)}, r"features \[60, 8\] and labels \[59\]"),
        ({"features": torch.zeros(3, 2), "labels": torch.zeros(3, dtype=torch.long)}, "has 3 rows, at least 5"),
    ],
)
def test_damaged_features(tmp_path: Path, replaced: dict, message: str) -> None:
    save(tmp_path, 0, **replaced)
    with pytest.raises(UserError, match=message) as error:
        read_steps(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_features(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no features/step-.*features.steps"):
        read_steps(tmp_path)
    (tmp_path / "features").mkdir()
    save_file({"hidden": torch.zeros(9, 2)}, tmp_path / "features" / "step-0.safetensors")
    with pytest.raises(UserError, match="lacks features and labels; found: hidden"):
        read_steps(tmp_path)
    (tmp_path / "features" / "step-0.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(UserError, match="is damaged or cut short"):
        read_steps(tmp_path)


def test_runs_of_other_steps_stand_side_by_side(tmp_path: Path) -> None:
    """A panel is named where the one above it is of another step."""
    steps = {"lora": (0, 20), "pissa": (0, 20), "ba_lora": (0, 50)}
    runs = read_runs([make_run(tmp_path / name, name, steps=saved) for name, saved in steps.items()])
    panels = draw_features(runs, measure(runs)).axes
    assert [panel.get_title() for panel in panels] == ["step 0", "step 20", "", "", "", "step 50"]
    assert not any(panel.texts for panel in panels)
