"""The folders of docs/architecture.md hold: each module stands on one floor and imports from no higher one."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import matgptq

PACKAGE = Path(matgptq.__file__).parent
DOCUMENT = Path(__file__).parent.parent / "docs" / "architecture.md"


def floors() -> dict[str, int]:
    """``{module, without the package's name: its floor}``; a directory stands for all modules in it."""
    table = DOCUMENT.read_text(encoding="utf-8").split("| folder | files |")[1].split("\n\n")[0]
    found: dict[str, int] = {}
    for floor, row in enumerate(table.splitlines()[2:]):
        for name in re.findall(r"`([^`]+)`", row.split("|")[2]):
            directory = PACKAGE / name
            files = (
                [file for file in directory.glob("*.py") if says_something(file)]
                if name.endswith("/")
                else [directory.with_suffix(".py")]
            )
            for module in map(module_name, files):
                assert module not in found, f"{module} stands in two lines of {DOCUMENT.name}"
                found[module] = floor
    return found


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("matgptq."):
            name = str(node.module).removeprefix("matgptq").removeprefix(".")
            for alias in node.names:
                inner = f"{name}.{alias.name}".removeprefix(".")
                yield inner if (PACKAGE / f"{inner.replace('.', '/')}.py").is_file() else name or inner


def says_something(file: Path) -> bool:
    return len(ast.parse(file.read_text(encoding="utf-8")).body) > 1


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if says_something(file)]
# The package's face, which hands out what the verbs do, and what runs the command line.
FILES = [file for file in FILES if file not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py")]


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_down(file: Path) -> None:
    floor, name = floors(), module_name(file)
    assert name in floor, f"{name} stands in no line of {DOCUMENT.name}"
    for imported in imports(file):
        if imported in ("__version__", "_native"):
            continue
        assert floor[imported] <= floor[name], f"{name} imports {imported}, which stands above it"


def test_no_line_names_what_is_not_there() -> None:
    assert set(floors()) == {module_name(file) for file in FILES}


def test_no_files_import_each_other_in_a_circle() -> None:
    known = {module_name(file): file for file in FILES}
    graphlib.TopologicalSorter({name: known.keys() & set(imports(file)) for name, file in known.items()}).prepare()
