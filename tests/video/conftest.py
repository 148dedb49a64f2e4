"""Clips encoded once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from video_clips import RECIPES, write_clip


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`clip(name)`: the path of the clip that RECIPES describes, made when first asked for."""
    folder = tmp_path_factory.mktemp("clips")

    def make(name: str) -> Path:
        path = folder / f"{name}{RECIPES[name].suffix}"
        if not path.exists():
            write_clip(path, RECIPES[name])
        return path

    return make
