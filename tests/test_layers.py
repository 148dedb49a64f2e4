"""Rooms import only rooms before them, and no module reaches itself again through its imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "engine"
PACKAGE = "kineticlip"

# A room may import itself and the rooms before it, lazily or not; never a later one.
ROOMS = (
    "runtime",
    "config",
    "video",
    "data",
    "formats",
    "models",
    "methods",
    "evaluation",
    "training",
    "report",
    "commands",
    "__main__",
)
RANK = {room: rank for rank, room in enumerate(ROOMS)}


def module_of(path: Path) -> str:
    parts = path.relative_to(ENGINE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted((ENGINE / PACKAGE).rglob("*.py"))}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of the package, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield node.lineno, inner if inner in MODULES else node.module


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    return ((line, name) for line, name in imports(path) if name.split(".")[0] == PACKAGE)


def test_there_are_modules_in_every_room() -> None:
    found = {name.split(".")[1] for name in MODULES if "." in name}
    assert found == set(ROOMS)


@pytest.mark.parametrize("name", [name for name in MODULES if "." in name])
def test_a_room_imports_only_rooms_before_it(name: str) -> None:
    own = name.split(".")[1]
    for line, imported in own_imports(MODULES[name]):
        assert imported != PACKAGE, f"{MODULES[name]}:{line}: the front door stands above all rooms"
        room = imported.split(".")[1]
        assert RANK[room] <= RANK[own], f"{MODULES[name]}:{line}: {own} must not import {imported}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: {found for _, found in own_imports(MODULES[name])} for name in MODULES}
    for name, found in graph.items():
        found.discard(name)
        # A package is loaded before its modules: the front doors of rooms are imports, too.
        parent = name.rpartition(".")[0]
        if parent in found:
            assert not graph[parent] & {name}, f"{name} and its package import each other"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))
