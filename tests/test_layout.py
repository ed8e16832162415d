"""Who may import whom: three packages that know nothing of each other's insides, rooms in one order, and no circles.

Every import counts: at a file's top, inside a function, and under TYPE_CHECKING.
"""

import ast
from pathlib import Path

import pytest

FORBIDDEN = {"ba_lora": {"data", "eval", "scripts", "train_nlg", "train_nlu"}, "data": {"eval"}, "eval": {"data"}}
# The library's rooms, lowest first: each imports from itself and from lower ones only. The files at its top are the
# ground.
ROOMS = ["config", "models", "methods", "objective", "training", "runs", "experiments"]
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
