"""How large files and functions may grow, and how many rooms the engine may have."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "engine" / "kineticlip"
PACKAGES = (ENGINE, ROOT / "kernels" / "kineticlip_kernels")
FILES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
FILE_LINES, FUNCTION_LINES, ROOT_ENTRIES = 450, 60, 14


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 200


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_function_is_too_long(path: Path) -> None:
    """A longer function has a comment right above it that says why. (ruff counts parameters.)"""
    lines = lines_of(path)
    assert len(lines) <= FILE_LINES
    for node in functions(path):
        first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        reason = first > 1 and lines[first - 2].lstrip().startswith("#")
        assert length <= FUNCTION_LINES or reason, f"{node.name}: {length} lines"


def test_half_of_the_files_are_short() -> None:
    assert median(len(lines_of(path)) for path in FILES) <= 180


def test_the_engine_has_about_a_dozen_rooms() -> None:
    entries = [path.name for path in ENGINE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= ROOT_ENTRIES, sorted(entries)
