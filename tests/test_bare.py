"""`--bare` hides what it says it hides, from the tests and from what they start."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bare

HIDDEN = ("cc", "c++", "gcc", "g++", "clang", "x86_64-linux-gnu-gcc-12", "ld", "nvcc", "ffmpeg",
          "ffprobe", "chromium", "google-chrome-stable", "nvidia-smi")  # fmt: skip
KEPT = ("git", "make", "ccache-stats", "clang-format", "ldd", "gcov", "add", "ffmpegthumbnailer")
CHILD = """
import shutil, sys, torch
found = [name for name in sys.argv[1:] if shutil.which(name)]
try:
    import torchcodec
except ModuleNotFoundError as error:
    found.append(error.name)
print(*found, torch.cuda.is_available())
"""


@pytest.mark.skipif(not bare.is_hidden(), reason="for pytest --bare")
def test_this_machine_is_bare() -> None:
    assert not [name for name in HIDDEN if shutil.which(name)]
    assert "CC" not in os.environ and not torch.cuda.is_available()
    with pytest.raises(ModuleNotFoundError, match="torchcodec"):
        importlib.import_module("torchcodec")
    words = [sys.executable, "-c", CHILD, *HIDDEN]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ran.stdout == "torchcodec False\n"


def test_the_option_makes_it_so(tmp_path: Path) -> None:
    """A run of its own, where every one of these programs is on PATH and CC names one."""
    for name in (*HIDDEN, *KEPT):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CC": "gcc"}
    for name in (bare.MARK, "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    words = ["-p", "no:cacheprovider", "--bare", f"{__file__}::test_this_machine_is_bare"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert ran.returncode == 0 and "1 passed" in ran.stdout, ran.stdout


def test_other_programs_stay(tmp_path: Path) -> None:
    first, second, links = tmp_path / "first", tmp_path / "second", tmp_path / "links"
    for folder in (first, second, links):
        folder.mkdir()
    for name in (*HIDDEN, *KEPT):
        (first / name).touch(0o755)
    (second / "git").touch(0o755)
    path = bare.without_programs(f"{first}:{second}:{tmp_path / 'absent'}", links)
    filtered, *rest = path.split(":")
    assert sorted(os.listdir(filtered)) == sorted(KEPT)
    assert shutil.which("git", path=filtered) and rest == [str(second), str(tmp_path / "absent")]
