"""What several test files need: the optional folder of real videos beside the repository."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: without a GPU its kernels run in the CPU interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=int, default=200, help="videos of the memory test (200)")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real media and golden outputs; tests over it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED.name!r} beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def shared_videos(shared: Path) -> Callable[[str], Path]:
    """`shared_videos(name)`: the path of one real video; fails when the folder lacks it."""

    def locate(name: str) -> Path:
        path = shared / "videos" / name
        assert path.is_file(), f"{path} is missing"
        return path

    return locate
