"""The README.md of every exported folder: what it is, its data, scores and configuration, and how to load it.

Names come from configurations and data, and cards are published: a name is one line without markup, and no folder of
this machine is told.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

from ba_lora.config.methods import adapter_loads, init_facts, tuner_facts, writes_lora
from ba_lora.config.schema import RunConfig, public, to_yaml
from ba_lora.glue import find_task
from ba_lora.io import write_text_atomic
from ba_lora.runs.results import refresh_result

TEMPLATE = """\
---
{{ card_data }}
---

# {{ source }} tuned with {{ method }}
{{ note }}{% if code %}
```python
{{ code }}
```
{% endif %}
Trained on {{ rows_used }} rows of {{ data }} ({{ data_source }}, revision {{ revision }}, sha256 {{ sha256 }}).

## Scores

{% for task, metric, score, n in scores %}{% if loop.first %}| task | metric | score (%) | n |
| --- | --- | --- | --- |
{% endif %}| {{ task }} | {{ metric }} | {{ score }} | {{ n }} |
{% else %}Not evaluated yet.
{% endfor %}
## Configuration

{{ fence }}yaml
{{ settings }}{{ fence }}
"""


def refresh_run(run_path: Path, config: RunConfig, result_path: Path | None = None) -> bool:
    """Bring a run's result and model cards up to the scores in its folder; return whether they have changed."""
    result = refresh_result(run_path, result_path or config.result_path)
    if result is not None:
        write_model_card(run_path, config, result)
    return result is not None


def write_model_card(run_path: Path, config: RunConfig, result: dict[str, Any]) -> None:
    """Write the card into every exported folder there is."""
    folders = [folder for name in ("adapter", "lora", "merged") if (folder := run_path / name).is_dir()]
    if not folders:
        return
    from huggingface_hub import ModelCard, ModelCardData

    source, data = public(config.model.name), result.get("data") or {}
    settings = to_yaml(config, for_others=True)
    facts = {
        "source": _line(source),
        "method": _line(config.method),
        "rows_used": data.get("rows_used", "?"),
        "data": _line(data.get("name", "?")),
        "data_source": _line(public(data.get("source", "?"))),
        "revision": _line(data.get("revision")),
        "sha256": data.get("sha256"),
        "scores": [
            (_line(task), _line(name), "undefined" if value is None else f"{100 * value:.2f}", _line(entry["n"]))
            for task, entry in sorted((result.get("evaluation") or {}).items())
            for name, value in entry["metrics"].items()
        ],
        "settings": settings,
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", settings)), default=0)),
    }
    for folder in folders:
        note = _note(folder.name, config)
        head = ModelCardData(
            base_model=_words(source),
            library_name="transformers" if folder.name == "merged" else "peft",
            tags=["ba-lora", _words(config.method)],
        )
        code = "" if note else _loading(folder.name, source, config)
        card = ModelCard.from_template(head, template_str=TEMPLATE, note=note, code=code, **facts)
        write_text_atomic(folder / "README.md", f"{card.content}\n")


def _note(name: str, config: RunConfig) -> str:
    """Return what must be said of a folder that cannot be loaded on the untouched base; "" for the others."""
    if name == "adapter" and init_facts(config.adapter).get("corrects"):
        return "\nThis is the adapter as trained, on the base in 4 bit (NF4). On the base as published use `merged/`.\n"
    if name != "adapter" or not writes_lora(config.adapter):
        return ""
    note = (
        "\nThis is the adapter as trained, on the residual base. On the untouched base use the plain LoRA in `lora/`, "
        "or `merged/`.\n"
    )
    if not init_facts(config.adapter).get("residual"):
        note = (
            "\nThis is the adapter as trained. Use the plain LoRA in `lora/`, which is the same model, or `merged/`.\n"
        )
    if not adapter_loads(config.adapter):
        note += (
            "\nPEFT by itself cannot make the trained model of it: the weights are kept in "
            "`trained.safetensors`, which PEFT does not load.\n"
        )
    return note


def _loading(name: str, source: str, config: RunConfig) -> str:
    auto_class, labels = "AutoModelForCausalLM", ""
    if config.kind == "nlu":
        auto_class, labels = (
            "AutoModelForSequenceClassification",
            f", num_labels={find_task(config.nlu.task).num_labels}",
        )
    if name == "merged":
        return f"model = {auto_class}.from_pretrained(FOLDER)"
    base = json.dumps(source, ensure_ascii=False)
    own = tuner_facts(config.adapter)["own_layers"]
    needed = f"import ba_lora.methods.{config.adapter.tuner}  # the layers, which PEFT lacks\n" if own else ""
    return (
        f"{needed}base = {auto_class}.from_pretrained({base}{labels})\nmodel = PeftModel.from_pretrained(base, FOLDER)"
    )


def _line(text: object) -> str:
    """Return a name as one line in which nothing is HTML or ends a table's cell."""
    return html.escape(_words(text), quote=False).replace("|", "\\|")


def _words(text: object) -> str:
    return " ".join(str(text).split())
