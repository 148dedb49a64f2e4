"""Every kernel of every target and what is wrong with it, as tables or as one JSON document."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kineticlip_kernels.aot.checks import TARGETS, compile_all, problems

COLUMNS = {
    "warps": "warps",
    "stages": "stages",
    "registers": "regs",
    "stack": "spill",
    "shared": "shared",
    "wide_loads": "ld128",
    "wide_stores": "st128",
}


def as_table(kernels: Sequence[dict[str, Any]]) -> str:
    """A line a kernel under a heading for its case, in at most 110 columns. Memory in bytes."""
    head = "".join(f"{title:>{len(title) + 2}}" for title in COLUMNS.values())
    lines, case = [f"  {'kernel':<36}{head}  products"], ""
    for kernel in kernels:
        if kernel["case"] != case:
            case = kernel["case"]
            lines.append(case)
        numbers = "".join(f"{kernel[key]:>{len(title) + 2}}" for key, title in COLUMNS.items())
        products = " ".join(f"{name} x{count}" for name, count in kernel["matrix"].items())
        name = kernel["kernel"].replace("_triton.", ".")
        lines.append(f"  {name:<36}{numbers}  {products}".rstrip())
    return "\n".join(lines)


def report(*, as_json: bool) -> int:
    """Prints it; minutes. -> the exit status, 1 where anything is wrong."""
    documents, failed = [], False
    with tempfile.TemporaryDirectory() as scratch:
        for arch, table in TARGETS:
            print(f"compiling for sm_{arch}, table {table} ...", file=sys.stderr, flush=True)
            found = compile_all(arch, table, Path(scratch))
            kernels, wrong = found["kernels"], problems(found, arch, table)
            failed = failed or bool(wrong)
            documents.append({"arch": arch, "table": table, "kernels": kernels, "problems": wrong})
            if not as_json:
                print(f"sm_{arch}, table {table}: {len(kernels)} kernels")
                print(as_table(kernels))
                print("\n".join(wrong) or "nothing wrong", end="\n\n", flush=True)
    if as_json:
        json.dump(documents, sys.stdout)
    return int(failed)
