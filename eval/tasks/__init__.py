"""The tasks by name. Adding one: a module with a `Task` subclass (see base.py), and a line in `_WHERE`."""

import importlib
from collections.abc import Iterator, Mapping

from ba_lora.errors import UserError
from ba_lora.words import nearest
from eval.tasks.base import Grade, Item, Source, Task

__all__ = ["TASKS", "Grade", "Item", "Source", "Task", "get_task"]

# name -> (module, class); imported on first use, since a grader's dependencies are heavy
_WHERE = {
    "toy": ("eval.tasks.toy", "Toy"),
    "lab": ("eval.tasks.lab", "Lab"),
    "gsm8k": ("eval.tasks.gsm8k", "GSM8K"),
    "math": ("eval.tasks.hendrycks_math", "HendrycksMath"),
    "heldout": ("eval.tasks.heldout", "Heldout"),
    "humaneval": ("eval.tasks.humaneval", "HumanEval"),
    "mbpp": ("eval.tasks.mbpp", "MBPP"),
    "mt_bench": ("eval.tasks.mt_bench", "MTBench"),
    "judge": ("eval.tasks.judge", "Judge"),
    "qa": ("eval.tasks.qa", "QA"),
    "mgsm_bn": ("eval.tasks.mgsm", "Bengali"),
    "mgsm_de": ("eval.tasks.mgsm", "German"),
    "mgsm_en": ("eval.tasks.mgsm", "English"),
    "mgsm_es": ("eval.tasks.mgsm", "Spanish"),
    "mgsm_fr": ("eval.tasks.mgsm", "French"),
    "mgsm_ja": ("eval.tasks.mgsm", "Japanese"),
    "mgsm_ru": ("eval.tasks.mgsm", "Russian"),
    "mgsm_sw": ("eval.tasks.mgsm", "Swahili"),
    "mgsm_te": ("eval.tasks.mgsm", "Telugu"),
    "mgsm_th": ("eval.tasks.mgsm", "Thai"),
    "mgsm_zh": ("eval.tasks.mgsm", "Chinese"),
}


class _Registry(Mapping):
    """Read-only mapping name -> task object; the module is imported when its task is first asked for."""

    def __init__(self) -> None:
        self._made: dict[str, Task] = {}

    def __getitem__(self, name: str) -> Task:
        if name not in self._made:
            module, class_name = _WHERE[name]
            self._made[name] = getattr(importlib.import_module(module), class_name)()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in _WHERE

    def __iter__(self) -> Iterator[str]:
        return iter(_WHERE)

    def __len__(self) -> int:
        return len(_WHERE)


TASKS = _Registry()


def get_task(name: str) -> Task:
    """Return the task called `name`. Raises UserError with the nearest names."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{nearest(name, TASKS)}; tasks: {', '.join(TASKS)}")
    return TASKS[name]
