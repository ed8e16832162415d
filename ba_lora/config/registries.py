"""Names that a configuration may choose from, where each list stands once, beside the code that it names.

Schedules, data sets and tasks are dicts in higher rooms, or in packages that the library may not import; the parts of
methods are files of ba_lora/methods. Their names, and a part's facts, are read from the source text: nothing is
imported, and a mistyped name is told without the seconds torch takes.
"""

import ast
import functools
import re
from typing import Any

from ba_lora.errors import UserError
from ba_lora.paths import PROJECT_ROOT

METHODS = "ba_lora/methods"


def schedules() -> tuple[str, ...]:
    """How a term's λ may change over training."""
    return tuple(_entries("ba_lora/objective/schedules.py", "SCHEDULES"))


def tuners() -> tuple[str, ...]:
    """What may be trained: the model's own weights, all of them or its biases, or an adapter."""
    return tuple(parts("tuner"))


@functools.cache
def method_terms() -> tuple[str, ...]:
    """The terms that methods themselves add to the loss."""
    return tuple(term for name in tuners() for term in facts("tuner", name)["term_names"])


def inits() -> tuple[str, ...]:
    """What LoRA's factors may be before the first step; `lora` is its own: A random, B = 0."""
    return ("lora", *parts("init"))


@functools.cache
def residual_inits() -> tuple[str, ...]:
    """Those whose s B₀A₀ is taken from the base."""
    return tuple(name for name in parts("init") if facts("init", name)["residual"])


def optimizers() -> tuple[str, ...]:
    """The optimizers that know A and B."""
    return tuple(parts("optimizer"))


def data_sets() -> tuple[str, ...]:
    """The training sets of NLG: a file of configs/data each."""
    return tuple(sorted(path.stem for path in (PROJECT_ROOT / "configs" / "data").glob("*.yaml")))


def tasks() -> tuple[str, ...]:
    """The NLG benchmarks."""
    return tuple(_entries("eval/tasks/__init__.py", "_WHERE"))


def toy_families() -> tuple[str, ...]:
    """The kinds of word problems that data.name=toy makes."""
    return tuple(_entries("data/toy.py", "FAMILIES"))


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
def parts(kind: str) -> dict[str, str]:
    """Return the methods' parts of a kind, tuner, init or optimizer: name (the file's) → its class."""
    found = {}
    for file in sorted((PROJECT_ROOT / METHODS).glob("*.py")):
        bound = re.search(rf"^{kind.upper()}(?:: .*)? = (\w+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        if bound:
            found[file.stem] = bound[1]
    return found


@functools.cache
def facts(kind: str, name: str) -> dict[str, Any]:
    """Return the literal class attributes of a part, its bases' where it says nothing else."""
    return _literals(f"{METHODS}/{name}.py", parts(kind)[name])


def _literals(file: str, class_name: str) -> dict[str, Any]:
    body = _source(file)
    node = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if node is None:  # it is imported
        where = next(
            entry.module
            for entry in body
            if isinstance(entry, ast.ImportFrom) and class_name in [alias.name for alias in entry.names]
        )
        return _literals(f"{where.replace('.', '/')}.py", class_name)
    found: dict[str, Any] = {}
    for base in node.bases:
        if not isinstance(base, ast.Name):
            told = f"write `from … import {ast.unparse(base).rpartition('.')[2]}`, and the name only"
            raise UserError(f"{file}: class {class_name}({ast.unparse(base)}): {told}")
        found |= _literals(file, base.id)
    for statement in node.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        if isinstance(target, ast.Name) and getattr(statement, "value", None) is not None:
            try:
                found[target.id] = ast.literal_eval(statement.value)
            except ValueError as error:
                told = "it is read without importing the file, so only plain values can stand there"
                raise UserError(f"{file}: {class_name}.{target.id} = {ast.unparse(statement.value)}: {told}") from error
    return found


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
