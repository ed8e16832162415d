"""The models of runs, for measures that need likelihoods: every pre-trained model is loaded once, with all adapters
that go onto it; what belongs to one run only (full fine-tuning, DoRA, …) comes after, from its merged model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ba_lora.config.layers import load_run
from ba_lora.config.schema import UNTUNED
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.models.source import model_source
from eval.engines import serving
from eval.engines.base import Engine, EngineOptions
from eval.engines.open import open_engine


@dataclass(frozen=True)
class RunModel:
    """A model that is open. path: the run's folder, None for the pre-trained model of the runs that follow; adapter:
    the name that `engine` knows it by, None for the engine's own model."""

    path: Path | None
    config: NLGConfig
    engine: Engine
    adapter: str | None = None


def open_models(run_paths: Sequence[Path], *, seed: int, trust_remote_code: bool) -> Iterator[RunModel]:
    """Yield for each pre-trained model first it, then its runs; an engine is closed when the next one is asked for."""
    configs = {path: load_run(path) for path in run_paths}
    tuned = [
        path for path, config in configs.items() if config.method != UNTUNED or config.model.quantization != "none"
    ]
    served = {model.run: model for path in tuned for model in serving.plan_serving([str(path)], serve=_serve(path))}
    groups: dict[tuple[str, str | None], list[Path]] = {}
    for path, config in configs.items():
        groups.setdefault((model_source(config.model), config.model.revision), []).append(path)
    for (base, revision), members in groups.items():
        names = {path: f"adapter{i}" for i, path in enumerate(members) if path in served and served[path].adapter}
        adapters = {name: served[path].adapter for path, name in names.items()}
        options = EngineOptions(seed=seed, trust_remote_code=trust_remote_code, revision=revision)
        with open_engine("hf", base, adapters=adapters, options=options) as engine:
            yield RunModel(None, configs[members[0]], engine)
            for path in members:
                if path in names or path not in served:
                    yield RunModel(path, configs[path], engine, names.get(path))
        for path in members:
            if path in served and path not in names:
                with open_engine("hf", served[path].base, options=options) as engine:
                    yield RunModel(path, configs[path], engine)


def _serve(run_path: Path) -> str:
    return "merged" if (run_path / "merged" / "config.json").is_file() else "hot"
