"""Fixtures shared by all tests. Everything runs offline: a hub name that is not a local file must fail at once."""

import datetime
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.tiers import mark_slow_tests

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="ba-lora-datasets-")  # of every process that tests start

ROOT = Path(__file__).resolve().parent.parent


DAYS = 7  # all slow tests have had their turn after so many, if a share is a seventh of them
EACH_DAY = "test_the_default_lifts_accuracy"  # `sh scripts/ba-lora.sh` as it is given comes first
START = time.monotonic()


def todays_order(items: list, day: datetime.date) -> list:
    """Return `items` from the place on at which the day's share begins: a seventh further each day, and each week
    between the places of the one before, so that no test is always the last of a share."""
    week, weekday = divmod(day.toordinal(), DAYS)
    start = int(len(items) * ((weekday + 0.618 * week % 1) / DAYS))
    return items[start:] + items[:start]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-minutes", type=float, help="only slow tests, the day's share first; none starts after so many minutes"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_slow_tests(items, whole=not any("::" in word for word in config.args))
    if config.getoption("slow_minutes") is not None:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=[item for item in items if item not in slow])
        items[:] = sorted(todays_order(slow, datetime.date.today()), key=lambda item: EACH_DAY not in item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("slow_minutes")
    if minutes is not None and time.monotonic() - START > 60 * minutes:
        pytest.skip("left for another day")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remove the run's own cache; let a run in which every test was skipped end like an empty one: with status 5."""
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"])
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker's session: the one that reports decides
        return
    if session.config.getoption("slow_minutes") is not None:
        return
    if exitstatus == 0 and reporter.stats.get("skipped") and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets and tiny pretrained models, or a skip with the reason."""
    folder = Path(os.environ.get("BA_LORA_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set BA_LORA_REAL_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of 2 layers with a byte-level tokenizer."""
    from tests.support.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def grid_folder(tmp_path, monkeypatch, root) -> Path:
    """A folder for a grid's files, its stages replaced by those of tests/workers/fake_grid.py."""
    from tests.workers import fake_grid

    monkeypatch.chdir(root)
    for module, names in (
        ("paths", ["PROJECT_ROOT"]),
        ("config.schema", ["PROJECT_ROOT"]),
        ("experiments.spec", ["PROJECT_ROOT"]),
        ("experiments.grid", ["GRID_PATH"]),
        ("experiments.grid_runs", ["GRID_PATH", "training_stage", "evaluation_stages", "evaluation_state"]),
        ("experiments.plan", ["evaluation_stages"]),
        ("experiments.state", ["GRID_PATH", "evaluation_state"]),
    ):
        for name in names:  # so that monkeypatch puts back what `use` changes
            path = f"ba_lora.{module}.{name}"
            monkeypatch.setattr(path, getattr(__import__(f"ba_lora.{module}", fromlist=[name]), name))
    monkeypatch.setattr("ba_lora.experiments.tables.RESULTS_PATH", tmp_path / "reports")
    monkeypatch.setenv("FAKE", str(tmp_path))
    fake_grid.use(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def box():
    """Run one program in a box with quick limits: `box(program, tests)` → its verdict."""
    from eval.sandbox.jobs import Job
    from eval.sandbox.sandbox import Sandbox
    from tests.support.boxes import QUICK, TESTS

    with Sandbox(limits=QUICK) as sandbox:
        yield lambda program, tests=TESTS, **more: sandbox.run([Job(program, tests, **more)], workers=1)[0]


@pytest.fixture
def train(tiny_model, tmp_path, monkeypatch):
    """Run train_nlg.py in this process on the tiny model: `train("rank=…", method=…)` → the run's folder."""
    import yaml

    base = {
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "adapter": {"rank": 4},
        "data": {"name": "toy", "num_rows": 24, "max_length": 400},
        "trainer": {
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "max_steps": 3,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "results_dir": str(tmp_path / "results"),
    }
    config = tmp_path / "base.yaml"
    config.write_text(yaml.safe_dump(base))

    def run(*overrides: str, method: str = "ba_lora", name: str = "run", config_path: Path = config) -> Path:
        import sys

        import train_nlg

        words = ["train_nlg.py", "--config", str(config_path), f"output_dir={tmp_path / name}", *overrides]
        if config_path == config:
            words += ["--method", method]
        else:
            words += [f"results_dir={tmp_path / 'results'}"]
        monkeypatch.setattr(sys, "argv", words)
        train_nlg.main()
        return tmp_path / name

    return run


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """A random BERT of 2 layers without a head, and a byte-level tokenizer."""
    from tests.support.tiny_nlu import save_tiny_encoder

    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture
def train_nlu(tiny_encoder, tmp_path, monkeypatch):
    """Run train_nlu.py in this process on a tiny encoder → the run's folder."""
    from tests.support.tiny_nlu import tiny_overrides

    def run(
        *overrides: str,
        method: str = "ba_lora",
        name: str = "run",
        config_path: Path = ROOT / "configs" / "nlu" / "toy.yaml",
        model: Path = tiny_encoder,
        task: str | None = "toy_pairs",
    ) -> Path:
        import sys

        import train_nlu

        words = ["train_nlu.py", "--config", str(config_path)]
        if "outputs" not in config_path.parts and config_path.name != "config.yaml":
            words += ["--method", method, *(["--task", task] if task else []), *tiny_overrides(model, method=method)]
        words += [f"output_dir={tmp_path / name}", f"results_dir={tmp_path / 'results'}", *overrides]
        monkeypatch.setattr(sys, "argv", words)
        train_nlu.main()
        return tmp_path / name

    return run


@pytest.fixture
def flash_attention_installed(monkeypatch):
    """Make flash-attention look as if it could run: a GPU, and the package."""
    import importlib.util

    import torch

    find_spec = importlib.util.find_spec
    found = importlib.util.spec_from_loader("flash_attn", loader=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *package: found if name == "flash_attn" else find_spec(name, *package)
    )
