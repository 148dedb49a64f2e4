"""Imports go one direction: the layers below, bottom first."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "engine" / "kineticlip"

# A module may import its own layer and the layers above it in this list, never a later one.
LAYERS = (
    {"errors"},
    {"config", "official"},
    {"batch", "prompts", "distributed", "measure", "journal"},
    {"video"},
    {"sampling", "views", "randaugment", "augment", "dataset", "loader", "prepare"},
    {"architectures", "info", "info_kin"},
    {"transformer", "vision", "resnet", "temporal", "formats", "weights", "text", "classifier"},
    {"checkpoint"},
    {"methods"},
    {"metrics", "rows", "results", "protocols", "optim", "deepspeed_config"},
    {"train", "train_log", "validation", "launch", "evaluate", "predictor", "features", "demo"}
    | {"adopt", "average"}
    | {"feature_cache"}
    | {"attributes", "inference", "fp8_tower", "parallel_eval", "device_loader", "list_eval"},
    {"report", "report_data", "figures", "parity"},
    {"commands"},
    {"cli", "__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules(root: Path) -> Iterator[Path]:
    return (
        path for path in root.rglob("*.py") if path.name != "__init__.py" or path.parent != root
    )


def layer_of(path: Path) -> str:
    return path.relative_to(ENGINE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "kineticlip":
                yield from ((node.lineno, f"kineticlip.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


@pytest.mark.parametrize("path", sorted(modules(ENGINE)), ids=lambda p: str(p.relative_to(ENGINE)))
def test_engine_imports_only_downward(path: Path) -> None:
    own = layer_of(path)
    assert own in RANK, f"{own} has no place in LAYERS"
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "kineticlip" or len(parts) < 2 or parts[1] == "__version__":
            continue
        assert parts[1] in RANK, f"{path}:{line}: {name} has no place in LAYERS"
        assert RANK[parts[1]] <= RANK[own], f"{path}:{line}: {own} must not import {name}"
