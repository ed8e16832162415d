"""A run as it is asked for, and the pre-trained model as a "run" of its own."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ba_lora.chat import is_chat
from ba_lora.config.layers import load_config
from ba_lora.config.schema import UNTUNED, RunConfig
from ba_lora.config.schema_nlg import scoring_settings
from ba_lora.paths import PROJECT_ROOT


@dataclass(frozen=True)
class Spec:
    """A run as it is asked for: what one would type after the training script, and what that resolves to."""

    config: RunConfig
    config_path: str
    method: str | None
    overrides: tuple[str, ...] = ()
    kind: str = "nlg"
    trained: bool = True  # False: the pre-trained model itself, evaluated by itself

    @classmethod
    def resolve(cls, config_path: str, method: str | None, overrides: Sequence[str], *, kind: str = "nlg") -> "Spec":
        """Return the run of a base, a method and overrides. Raises UserError for anything wrong in them."""
        config = load_config(config_path, method=method, overrides=tuple(overrides), kind=kind)
        return cls(config, config_path, method, tuple(overrides), kind)


def untuned_config(config: RunConfig) -> RunConfig:
    """Return the "run" of the pre-trained model itself, under the method name `untuned`: one for all runs on it."""
    asked = [dataclasses.asdict(config.model), scoring_settings(dataclasses.asdict(config.eval))]
    if is_chat(getattr(config.data, "template", "")):
        asked.append(config.data.template)
    key = json.dumps(asked, sort_keys=True)
    name = f"{config.name}-{UNTUNED}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    return dataclasses.replace(
        config,
        method=UNTUNED,
        output_dir=str(PROJECT_ROOT / "outputs" / name),
        trainer={},
        hub=dataclasses.replace(config.hub, push=False),
    )
