"""What several test files need: the bare machine, real videos, checkpoint files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bare
import needs

if bare.asked_for():
    bare.hide()
if not torch.cuda.is_available():
    # Before anything imports triton: without a GPU its kernels run in the CPU interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", type=int, default=200, help="videos of the memory test (200)")
    parser.addoption(
        "--bare", action="store_true", help="hide torchcodec, compilers, ffmpeg, chromium and GPUs"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("bare") and not bare.is_hidden():
        raise pytest.UsageError("--bare: has to stand on the command line or in PYTEST_ADDOPTS")
    for name, why_not in needs.NEEDS.items():
        config.addinivalue_line("markers", f"{name}: skips where {why_not.__name__} is not there")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, why_not in needs.NEEDS.items():
            if item.get_closest_marker(name) and (reason := why_not()):
                item.add_marker(pytest.mark.skip(reason=reason))


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


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`sample(name)`: the path of one of checkpoint_files.FILES, written once."""
    import checkpoint_files

    folder = tmp_path_factory.mktemp("checkpoints")
    written: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in written:
            written[name] = checkpoint_files.write(name, folder)
        return written[name]

    return path
