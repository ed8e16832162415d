"""Who may import whom: three packages that know nothing of each other's insides, rooms in one order, and no circles.

Every import counts: at a file's top, inside a function, and under TYPE_CHECKING. And one word has one meaning: no two
files define a public class or function of one name.
"""

import ast
from pathlib import Path

import pytest

FORBIDDEN = {"ba_lora": {"data", "eval", "scripts", "train_nlg", "train_nlu"}, "data": {"eval"}, "eval": {"data"}}
# The library's rooms, lowest first: each imports from itself and from lower ones only. The files at its top are the
# ground.
ROOMS = ["config", "models", "methods", "objective", "training", "runs", "experiments"]
# Names that several files define on purpose, all with the meaning that the reason tells.
SHARED_NAMES = {
    "main": "the entry point of a command",
    "train": "what a main does: train_nlg.py and train_nlu.py read the same way",
    "check": "the hook of eval.check: raise the UserError that the command would end with",
    "write_factors": "writes the file of A₀ and B₀ that a method starts from; methods/build.py calls it by its module",
}
FACADE = "ba_lora/__init__.py"  # what a library user imports, from whichever room


def imported(file: Path, root: Path) -> dict[str, int]:
    """Return the modules that a file imports, with the line of each; relative imports are written out."""
    package = file.relative_to(root).with_suffix("").parts[:-1]
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found[module] = node.lineno
            found |= {f"{module}.{alias.name}": node.lineno for alias in node.names}
    return found


def modules(root: Path) -> dict[str, Path]:
    """Return every module of the project by its dotted name."""
    files = [*root.glob("*.py"), *(file for top in ("ba_lora", "data", "eval") for file in (root / top).rglob("*.py"))]
    names = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


@pytest.fixture(scope="module")
def graph(root) -> dict[str, dict[str, int]]:
    """Module → the project's modules that it imports, with the line."""
    known = modules(root)
    assert len(known) > 100
    return {
        name: {target: line for target, line in imported(file, root).items() if target in known and target != name}
        for name, file in known.items()
    }


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_know_nothing_of_those_built_on_them(graph, package):
    members = [name for name in graph if name.split(".")[0] == package]
    assert members
    wrong = [
        f"{name}, line {line}, imports {target}"
        for name in members
        for target, line in graph[name].items()
        if target.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong


def room(module: str) -> int | None:
    """Return the place of a module's room in the order, 0 for the ground; None for the library's own face."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    return ROOMS.index(parts[1]) + 1 if parts[1] in ROOMS else 0


def test_a_room_imports_lower_rooms_only(graph, root):
    library = [name for name in graph if name.startswith("ba_lora.")]
    folders = {path.name for path in (root / "ba_lora").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(ROOMS)
    wrong = [
        f"{name}, line {line}, imports {target}"
        for name in library
        for target, line in graph[name].items()
        if target.startswith("ba_lora.") and room(target) > room(name)
    ]
    assert not wrong


def test_one_word_has_one_meaning(root):
    places: dict[str, set[str]] = {}
    for name, file in modules(root).items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
                places.setdefault(node.name, set()).add(name)
    several = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    assert {name: found for name, found in several.items() if name not in SHARED_NAMES} == {}
    assert set(several) == set(SHARED_NAMES)  # a name that stands once now needs no reason


def test_no_module_imports_itself_by_way_of_others(graph):
    """Strongly connected components of more than one module, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            members = []
            while not members or members[-1] != name:
                members.append(stack.pop())
            if len(members) > 1:
                circles.append(sorted(members))

    for name in graph:
        if name not in index:
            visit(name)
    assert not circles
