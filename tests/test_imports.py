"""No two files import each other, not even by way of others or within a function."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import diffpo

ROOT = Path(diffpo.__file__).parent.parent


def imports(node: ast.AST, package: str) -> Iterator[str]:
    """The names that a file imports, wherever in it, except for type checkers alone: "a.b.c" of ``from a.b import c``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield from imports(statement, package)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            source = ".".join([*above, *([child.module] if child.module else [])])
            yield from (f"{source}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child, package)


def graph(root: Path, *packages: str) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in packages
        for path in (root / package).rglob("*.py")
    }

    def module(name: str) -> str:
        return name if name in paths else name.rpartition(".")[0]

    found = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        named = {module(imported) for imported in imports(ast.parse(path.read_text()), package)}
        found[name] = (named & paths.keys()) - {name}
    return found


def test_no_imports_are_circular():
    modules = graph(ROOT, "diffpo", "diffpo_kernels")
    assert modules["diffpo.public"] > {"diffpo.models.checkpoints", "diffpo.trajectory"}
    try:
        TopologicalSorter(modules).prepare()
    except CycleError as error:
        pytest.fail(f"circular imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize(
    "second",
    ["import p.a", "from p import a", "from p.a import x", "from . import a", "def f():\n    from .a import x"],
)
def test_circles_are_found(tmp_path, second):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").touch()
    (tmp_path / "p" / "a.py").write_text("from p import b\nx = 1\n")
    (tmp_path / "p" / "b.py").write_text(second + "\n")
    with pytest.raises(CycleError):
        TopologicalSorter(graph(tmp_path, "p")).prepare()
    (tmp_path / "p" / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a\n")
    TopologicalSorter(graph(tmp_path, "p")).prepare()


def test_a_package_imports_from_those_above_it_in_the_list_only():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    listed = re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE)
    assert set(listed) == {path.parent.name for path in (ROOT / "diffpo").glob("*/__init__.py")}

    def place(module: str) -> int | None:
        package = module.split(".")[1:2]
        return listed.index(package[0]) if package and package[0] in listed else None

    modules = graph(ROOT, "diffpo")
    places = {name: place(name) for name in modules}
    wrong = [(name, other) for name, imported in modules.items() for other in imported
             if None not in (places[name], places.get(other)) and places[other] > places[name]]  # fmt: skip
    assert wrong == []
