"""How models are served: merged, or as adapters on a shared base. The rule stands at the head of eval/generate.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ba_lora.chat import is_chat
from ba_lora.errors import UserError
from ba_lora.paths import ADAPTER_CONFIG
from eval.engines import adapters
from eval.engines import base as engines

SERVE = ("auto", "hot", "merged")


@dataclass(frozen=True)
class ServedModel:
    """A model as it is served: `base` by itself, or with the PEFT adapter in `adapter`.

    name: what the user typed; served: merged, lora, adapter or model; run: the run folder, None for other models.
    """

    name: str
    base: str
    served: str
    adapter: Path | None = None
    run: Path | None = None
    revision: str | None = None

    @property
    def keeps(self) -> Path | None:
        """The folder that keeps its completions and scores: the run's or, of a run at one rank, RUN/ranks/<b>."""
        return self.run or (None if self.adapter is None or run_of_rank(self.adapter) is None else self.adapter)

    @property
    def needs_transformers(self) -> bool:
        """Whether it is an adapter that vLLM cannot serve."""
        return self.adapter is not None and adapters.hot_obstacle(adapters.read_adapter(self.adapter)) is not None

    @property
    def trained_in(self) -> Path | None:
        """The run that it is, or is a rank of."""
        return self.run or (None if self.adapter is None else run_of_rank(self.adapter))


def plan_serving(models: Sequence[str], *, serve: str = "auto", revision: str | None = None) -> list[ServedModel]:
    """Decide how each model is served. Raises UserError for a folder that holds none."""
    repeated = {name for name in models if list(models).count(name) > 1}
    if repeated:
        raise UserError(f"--model names {sorted(repeated)[0]} twice")
    bases = [_hot_base(Path(name)) for name in models]  # base of a run that can be served hot, else None
    served = []
    for name, base in zip(models, bases, strict=True):
        path = Path(name)
        if (path / "config.yaml").is_file():
            shared = base is not None and bases.count(base) > 1
            merged = (path / "merged" / "config.json").is_file()
            if base is None and not merged and serve != "merged":
                base = _unmerged_base(path)
            if serve == "hot" and base is None:
                raise UserError(f"{name} cannot be served hot: no plain LoRA adapter in it; leave serve=hot out")
            if serve == "merged" and not merged:
                raise UserError(f"{name}/merged is missing: export the run with export.merged=true, or use serve=hot")
            if base is not None and (serve == "hot" or (serve == "auto" and (shared or not merged))):
                adapter = _hot_adapter(path)
                served.append(
                    ServedModel(name, base, adapter.name, adapter=adapter, run=path, revision=_run_model(path)[1])
                )
            elif merged:
                served.append(ServedModel(name, str(path / "merged"), "merged", run=path))
            else:
                raise UserError(f"{name} holds neither merged/ nor an adapter to serve: finish its training and export")
        elif (path / ADAPTER_CONFIG).is_file():
            adapters.read_adapter(path)  # refused here, before any model is loaded
            if revision is None and (run := run_of_rank(path)) is not None:
                revision_there = _run_model(run)[1]
            else:
                revision_there = revision
            base = adapters.adapter_base(path)
            served.append(ServedModel(name, base, "adapter", adapter=path, revision=revision_there))
        else:
            engines.require_model(name)
            served.append(ServedModel(name, name, "model", revision=None if path.is_dir() else revision))
    return served


def run_of_rank(adapter: Path) -> Path | None:
    """Return RUN of an adapter RUN/ranks/<b>, None for any other folder."""
    run = adapter.parent.parent
    return run if adapter.parent.name == "ranks" and (run / "config.yaml").is_file() else None


def kept_template(run: Path | None) -> str | None:
    """Return the chat template that a run was trained in, as its exports keep it; None for another frame, or no run.

    Raises UserError where the run has none of its exports left.
    """
    from ba_lora.config.layers import load_run

    if run is None or not is_chat(getattr(load_run(run).data, "template", "")):
        return None
    files = [run / name / "chat_template.jinja" for name in ("adapter", "merged", "lora")]
    if not (found := [file for file in files if file.is_file()]):
        raise UserError(f"{run} was trained in a chat template, and none of its exports holds it: export the run again")
    return found[0].read_text(encoding="utf-8")


def run_base(run: Path) -> tuple[str | None, str | None]:
    """Return base and hub revision of a run's adapter, None where it has none (full fine-tuning)."""
    adapter = _hot_adapter(run)
    if not (adapter / ADAPTER_CONFIG).is_file():
        return None, None
    return adapters.adapter_base(adapter), _run_model(run)[1]


def _hot_adapter(run: Path) -> Path:
    return run / "lora" if (run / "lora" / ADAPTER_CONFIG).is_file() else run / "adapter"


def _run_model(run: Path) -> tuple[bool, str | None]:
    """Return whether a run's base was quantised, and the base's hub revision."""
    from ba_lora.config.layers import load_run

    model = load_run(run).model
    return model.quantization != "none", model.revision


def _unmerged_base(run: Path) -> str | None:
    """Return the base of a run folder that has nothing but an adapter which only transformers serves (bottlenecks,
    virtual tokens, DoRA without merged/), None for every other model."""
    adapter = _hot_adapter(run)
    if not (adapter / ADAPTER_CONFIG).is_file() or _run_model(run)[0]:
        return None
    return adapters.adapter_base(adapter)


def _hot_base(run: Path) -> str | None:
    """Return the base of a run folder whose adapter may be served hot, None for every other model."""
    adapter = _hot_adapter(run)
    if not (run / "config.yaml").is_file() or not (adapter / ADAPTER_CONFIG).is_file() or _run_model(run)[0]:
        return None
    return None if adapters.hot_obstacle(adapters.read_adapter(adapter)) else adapters.adapter_base(adapter)
