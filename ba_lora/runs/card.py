"""The README.md of every exported folder: what it is, its data, scores and configuration, and how to load it.

Names come from configurations and data, and cards are published: a name is one line without markup, and no folder of
this machine is told.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

import yaml

from ba_lora.config.schema import RunConfig, public, to_yaml
from ba_lora.glue import find_task
from ba_lora.io import write_text_atomic


def write_model_card(run_path: Path, config: RunConfig, result: dict[str, Any]) -> None:
    """Write the card into every exported folder there is."""
    source = public(config.model.name)
    data = result.get("data") or {}
    scores = [
        f"| {_line(task)} | {_line(name)} | {'undefined' if value is None else format(100 * value, '.2f')} "
        f"| {_line(entry['n'])} |"
        for task, entry in sorted((result.get("evaluation") or {}).items())
        for name, value in entry["metrics"].items()
    ]
    table = "\n".join(["| task | metric | score (%) | n |", "| --- | --- | --- | --- |", *scores])
    settings = to_yaml(config, for_others=True)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", settings)), default=0))
    for name in ("adapter", "lora", "merged"):
        folder = run_path / name
        if not folder.is_dir():
            continue
        note = _note(name, config)
        library = "transformers" if name == "merged" else "peft"
        head = {"base_model": _words(source), "library_name": library, "tags": ["ba-lora", _words(config.method)]}
        how = "" if note else f"\n```python\n{_loading(name, source, config)}\n```\n"
        write_text_atomic(
            folder / "README.md",
            f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)}---\n\n"
            f"# {_line(source)} tuned with {_line(config.method)}\n{note}{how}\n"
            f"Trained on {data.get('rows_used', '?')} rows of {_line(data.get('name', '?'))} "
            f"({_line(public(data.get('source', '?')))}, revision {_line(data.get('revision'))}, "
            f"sha256 {data.get('sha256')}).\n\n"
            f"## Scores\n\n{table if scores else 'Not evaluated yet.'}\n\n"
            f"## Configuration\n\n{fence}yaml\n{settings}{fence}\n",
        )


def _note(name: str, config: RunConfig) -> str:
    """Return what must be said of a folder that cannot be loaded on the untouched base; "" for the others."""
    if name != "adapter" or config.adapter.init == "lora":
        return ""
    note = (
        "\nThis is the adapter as trained, on the residual base. On the untouched base use the plain LoRA in `lora/`, "
        "or `merged/`.\n"
    )
    if config.adapter.init != "pissa":
        note += (
            "\nPEFT cannot repeat its initialisation and rebuild the residual: the weights are kept in "
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
    return f"base = {auto_class}.from_pretrained({base}{labels})\nmodel = PeftModel.from_pretrained(base, FOLDER)"


def _line(text: object) -> str:
    """Return a name as one line in which nothing is HTML or ends a table's cell."""
    return html.escape(_words(text), quote=False).replace("|", "\\|")


def _words(text: object) -> str:
    return " ".join(str(text).split())
