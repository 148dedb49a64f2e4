"""Whether this machine can compile what PyTorch and Triton generate."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def why_no_compiler() -> str:
    """Why Inductor (on a CPU) and Triton's launcher (on a GPU) cannot compile; "" where they can.

    Both need a C++ compiler and the headers of this Python.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler: install the package g++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"no Python.h in {sysconfig.get_path('include')}: install the package python3-dev"
    return ""
