"""`pytest --bare`: a machine with Python, git and make, tried on one that has more.

What is hidden is hidden from this process and from those it starts: PATH leads past the programs,
a package that cannot be imported stands before torchcodec, and no GPU is visible.
"""

from __future__ import annotations

import atexit
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

PROGRAMS = re.compile(
    r"""(?:[\w.]+-)*                                       # x86_64-linux-gnu-
        (?: cc | gcc | g\+\+ | c\+\+ | c89 | c99 | cpp | tcc | icx | icpx | nvc | nvc\+\+ | nvcc
          | clang | clang\+\+ | as | ld | ld\.\w+
          | ffmpeg | ffprobe | ffplay | nvidia-smi
          | chrome | chromium | chromium-browser | google-chrome | google-chrome-stable )
        (?:-[\d.]+)?                                       # -12""",
    re.VERBOSE,
)
COMPILERS_BY_NAME = ("CC", "CXX", "CUDAHOSTCXX")  # variables that name one past PATH
TORCHCODEC = """raise ModuleNotFoundError("No module named 'torchcodec'", name="torchcodec")\n"""
MARK = "KINETICLIP_TESTS_BARE"  # the folder with all of it, also in pytest-xdist's workers
MODULES = "modules"


def asked_for() -> bool:
    """Whether --bare stands on pytest's command line; its own parser runs too late for PyTorch.

    Or on that of the pytest that started this process.
    """
    options = [*sys.argv[1:], *shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))]
    return "--bare" in options or is_hidden()


def is_hidden() -> bool:
    """Whether `hide` has run, here or in the process that started this one."""
    return MARK in os.environ


def hide() -> None:
    """Makes this process and its children a bare machine; before anything looks for a GPU."""
    if is_hidden():  # pytest-xdist has given its worker the sys.path of before
        sys.path.insert(0, str(Path(os.environ[MARK]) / MODULES))
        return
    folder = Path(tempfile.mkdtemp(prefix="bare-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = folder / MODULES / "torchcodec"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TORCHCODEC)
    behind = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    for name in COMPILERS_BY_NAME:
        os.environ.pop(name, None)
    os.environ |= {
        MARK: str(folder),
        "PATH": without_programs(os.environ.get("PATH", os.defpath), folder),
        "PYTHONPATH": os.pathsep.join([str(package.parent), *behind]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    sys.path.insert(0, str(package.parent))


def without_programs(path: str, folder: Path) -> str:
    """PATH with every directory that holds one of PROGRAMS replaced by links to its other files."""
    kept = []
    for number, directory in enumerate(path.split(os.pathsep)):
        names = os.listdir(directory) if os.path.isdir(directory) else []
        if any(PROGRAMS.fullmatch(name) for name in names):
            links = folder / f"programs-{number}"
            links.mkdir()
            for name in names:
                if not PROGRAMS.fullmatch(name):
                    (links / name).symlink_to(Path(directory).absolute() / name)
            directory = str(links)
        kept.append(directory)
    return os.pathsep.join(kept)
