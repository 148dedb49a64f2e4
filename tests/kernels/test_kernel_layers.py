"""Imports inside the kernels package: no circle, no engine, Triton in *_triton files alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kineticlip_kernels

ROOT = Path(kineticlip_kernels.__path__[0])


def modules(root: Path) -> dict[str, Path]:
    """Every module and package under a package's folder, by its dotted name."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if path.name == "__init__.py" else parts)] = path
    return found


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name imported from it or "") of every import, at the top and inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def packages_above(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def graph(root: Path) -> dict[str, set[str]]:
    """What each module imports of its own package, and the packages that importing it runs.

    The packages around a module run before it in any case, so nothing is said of those, unless it
    imports one of them by name.
    """
    known = modules(root)
    edges: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for module, member in imports(ast.parse(path.read_text())):
            target = f"{module}.{member}" if f"{module}.{member}" in known else module
            if target in known:
                around = packages_above(name) | {name}
                edges[name] |= {target} | (packages_above(target) - around)
    return edges


def complaints(root: Path) -> list[str]:
    """Everything that is wrong with the imports of a package."""
    edges, found = graph(root), []
    if not edges:
        return [f"no module under {root}"]
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        found.append("circle: " + " <- ".join(error.args[1]))
    for name, path in modules(root).items():
        if edges[name] & packages_above(name):
            found.append(f"{name} imports a package that it is in")
        tree, triton = ast.parse(path.read_text()), path.stem.endswith("_triton")
        roots = {module.split(".")[0] for module, _ in imports(tree)}
        if "kineticlip" in roots:
            found.append(f"{name} imports the engine")
        if "triton" in roots and not triton:
            found.append(f"{name} imports triton")
        first = {module for node in tree.body for module, _ in at_import(node)}
        if not triton and any(module.endswith("_triton") for module in first):
            found.append(f"{name} imports a Triton file before it is chosen")
    return found


def at_import(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """The imports that run when the module is imported."""
    return iter(()) if isinstance(node, ast.FunctionDef | ast.ClassDef) else imports(node)


def test_the_kernels_package() -> None:
    assert complaints(ROOT) == []
    assert len(graph(ROOT)) > 50


def test_no_name_of_a_package_is_a_module_of_it_too() -> None:
    """`package.name` would be one or the other, whichever was imported last."""
    packages = [path.parent for path in ROOT.rglob("__init__.py")]
    assert len(packages) > 8
    for folder in packages:
        children = {path.stem for path in folder.glob("*.py")}
        children |= {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()}
        tree = ast.parse((folder / "__init__.py").read_text())
        for module, name in imports(tree):
            if name in children:
                assert module.split(".") == ["kineticlip_kernels"], f"{folder}: {name}"


FINE = {
    "__init__": "from pack.room import op",
    "common": "import os",
    "room/__init__": "from pack.room.ops import op",
    "room/ops": "from pack import common\n\ndef op():\n    from pack.room.op_triton import run",
    "room/op_triton": "import triton\nfrom pack.common import os",
}
WRONG = {
    "a function that imports who imports it": (
        {"common": "def late():\n    from pack.room.ops import op"},
        "circle: ",
    ),
    "a room below whose package imports a room above": (
        {
            "low/__init__": "from pack.room import op",
            "low/deep": "",
            "room/ops": "import pack.low.deep",
        },
        "circle: ",
    ),
    "a constant of the room": (
        {"room/op_triton": "import triton\nfrom pack.room import op"},
        "pack.room.op_triton imports a package that it is in",
    ),
    "the root": ({"common": "from pack import op"}, "pack.common imports a package that it is in"),
    "the engine": (
        {"common": "def f():\n    import kineticlip.cli"},
        "imports the engine",
    ),
    "triton": ({"common": "def f():\n    import triton.language"}, "pack.common imports triton"),
    "a kernel too early": (
        {"room/ops": "from pack.room.op_triton import run"},
        "pack.room.ops imports a Triton file before it is chosen",
    ),
}


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "pack" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "pack"


def test_a_package_without_faults(tmp_path: Path) -> None:
    assert complaints(written(tmp_path, FINE)) == []


@pytest.mark.parametrize("fault", WRONG)
def test_faults_are_found(fault: str, tmp_path: Path) -> None:
    files, complaint = WRONG[fault]
    assert any(complaint in found for found in complaints(written(tmp_path, FINE | files)))


def test_an_empty_folder_is_a_fault(tmp_path: Path) -> None:
    assert complaints(tmp_path) == [f"no module under {tmp_path}"]
