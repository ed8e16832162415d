"""Names that a configuration may choose from, where each list stands once, beside the code that it names.

Schedules, tuners, data sets and tasks are dicts in higher rooms, or in packages that the library may not import. Their
keys are read from the source text: nothing is imported, and a mistyped name is told without the seconds torch takes.
"""

import ast
import functools

from ba_lora.paths import PROJECT_ROOT


def schedules() -> tuple[str, ...]:
    """How a term's λ may change over training."""
    return tuple(_entries("ba_lora/objective/schedules.py", "SCHEDULES"))


def tuners() -> tuple[str, ...]:
    """What may be trained: the model's own weights, all of them or its biases, or an adapter of PEFT."""
    return ("full", "bitfit", *_entries("ba_lora/methods/build.py", "PEFT_CONFIGS"))


def data_sets() -> tuple[str, ...]:
    """The training sets of NLG: a file of configs/data each."""
    return tuple(sorted(path.stem for path in (PROJECT_ROOT / "configs" / "data").glob("*.yaml")))


def tasks() -> tuple[str, ...]:
    """The NLG benchmarks."""
    return tuple(_entries("eval/tasks/__init__.py", "_WHERE"))


def nlu_metrics() -> tuple[str, ...]:
    """What a classifier's predictions may be scored by."""
    return tuple(_entries("eval/metrics/scores.py", "METRICS"))


@functools.cache
def judged_tasks() -> tuple[str, ...]:
    """Those tasks that a judge model grades: their class says `judged = True`."""
    return tuple(name for name, where in _entries("eval/tasks/__init__.py", "_WHERE").items() if _is_judged(where))


def _is_judged(where: ast.expr) -> bool:
    module, class_name = ast.literal_eval(where)
    body = next(node for node in _source(f"{module.replace('.', '/')}.py") if getattr(node, "name", "") == class_name)
    return any(ast.unparse(statement) == "judged = True" for statement in body.body)


@functools.cache
def _entries(file: str, variable: str) -> dict[str, ast.expr]:
    """Return the dict that a module binds to `variable`: its keys, and the values as they are written."""
    for node in _source(file):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(ast.unparse(target) == variable for target in targets):
            return {ast.literal_eval(key): value for key, value in zip(node.value.keys, node.value.values, strict=True)}
    raise LookupError(f"{file} binds no {variable}")


def _source(file: str) -> list[ast.stmt]:
    return ast.parse((PROJECT_ROOT / file).read_text(encoding="utf-8")).body
