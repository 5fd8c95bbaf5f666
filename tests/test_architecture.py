"""The shape of the source tree: no circles, no private names across files, no long files.

``lint-imports`` checks the floors and the circles between neighbors. Here every circle is named, file by file, and also those that run
through the ``__init__`` of a package. Imports for type checkers only do not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

import torchprobe

ROOT = Path(torchprobe.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = sorted({str(path.relative_to(ROOT).parent) for path in FILES})
MOST_LINES = 400
PUBLIC_IN_PYTHON = {"_asdict", "_fields", "_make", "_replace"}
"""Methods of named tuples."""


@cache
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("torchprobe", exclude_type_checking_imports=True, cache_dir=None)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def files_of(room: str) -> list[Path]:
    return [path for path in FILES if path.parent == ROOT / room]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names_defined(path: Path) -> set[str]:
    """Private functions, classes, variables, parameters, and attributes of ``self``, that a file defines."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return {name for name in names if private(name)}


@cache
def private_names_of_the_library() -> frozenset[str]:
    return frozenset().union(*map(private_names_defined, FILES))


def private_names_used(path: Path) -> Iterator[str]:
    """Private names of other files, with the line that uses them. Names of other libraries, such as ``nn.Module._apply``, do not count."""
    elsewhere = private_names_of_the_library() - private_names_defined(path) - PUBLIC_IN_PYTHON
    package = path.parent
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torchprobe":
            for name in (alias.name for alias in node.names if private(alias.name)):
                if not (package / f"{name}.py").is_file():  # a private module of the same package
                    yield f"line {node.lineno}: {node.module}.{name}"
        elif isinstance(node, ast.Attribute) and node.attr in elsewhere:
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_circles(room: str) -> None:
    circles = set()
    for module in map(module_of, files_of(room)):
        for imported in imports().find_modules_directly_imported_by(module):
            way_back = imports().find_shortest_chain(importer=imported, imported=module)
            if way_back is not None:
                circle = list(way_back)
                start = circle.index(min(circle))
                circles.add(" → ".join([*circle[start:], *circle[:start], circle[start]]))
    assert not circles, "\n".join(sorted(circles))


@pytest.mark.parametrize("room", ROOMS)
def test_no_private_name_of_another_file(room: str) -> None:
    uses = [f"{path.name}, {use}" for path in files_of(room) for use in private_names_used(path)]
    assert not uses, "\n".join(uses)


@pytest.mark.parametrize("room", ROOMS)
def test_files_can_be_read_in_one_sitting(room: str) -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files_of(room)}
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert not long, f"more than {MOST_LINES} lines: {long}"
