"""Prints those of the given Python files whose imports this machine can meet; names the others.

python bench/importable.py tests/kernels/test_*.py
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

OWN = ("kineticlip", "kineticlip_kernels")  # absent from these: a mistake, not a machine's lack


def missing(path: Path) -> str:
    """The package that a file cannot do without and this machine lacks; "" where there is none."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OWN:
            raise
        return package
    return ""


def main() -> int:
    for name in sys.argv[1:]:
        package = missing(Path(name))
        if package:
            print(f"{name}: left out, {package} is not here", file=sys.stderr)
        else:
            print(name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
