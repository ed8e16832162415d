"""Who may import whom: the library knows nothing of the data, the evaluation or the scripts, which are built on it."""

import ast

import pytest

FORBIDDEN = {"ba_lora": {"data", "eval", "scripts", "train_nlg", "train_nlu"}, "data": {"eval"}, "eval": {"data"}}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(root, package):
    files = sorted((root / package).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found = FORBIDDEN[package] & {name.split(".")[0] for name in names}
            assert not found, f"{file.relative_to(root)}, line {node.lineno}, imports {found}"
