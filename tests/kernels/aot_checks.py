"""What the compilation tests share: compiling for a target, and what is wrong with a kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kineticlip_kernels import tuning

HERE = Path(__file__).parent
CASES = sorted(HERE.glob("aot_cases_*.py"))
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have
TENSOR_CORES = {80: {"mma.sync"}, 90: {"HGMMA", "QGMMA"}, 100: {"tcgen05.mma"}}
# Kernels without a row for sm_80: e4m3 began with sm_89.
EIGHT_BITS = {"quantize_rows", "linear_fp8"}


def compile_all(arch: int, table: str, cache: Path, cases: Sequence[Path] = CASES) -> Any:
    """What aot_compile.py reports, from a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(HERE / "aot_compile.py"), "--json", str(arch), table]
    done = subprocess.run(
        [*command, *map(str, cases)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def complaints(kernel: dict[str, Any], arch: int) -> list[str]:
    """What is wrong with one compiled kernel."""
    found = []
    if kernel["stack"]:
        found.append(f"spills: {kernel['stack']} bytes of stack")
    if kernel["shared"] > SHARED_LIMIT[arch]:
        found.append(f"shared memory {kernel['shared']} of {SHARED_LIMIT[arch]} bytes")
    if kernel["kind"] == "matrix" and not TENSOR_CORES[arch] & kernel["matrix"].keys():
        found.append(f"no {' or '.join(sorted(TENSOR_CORES[arch]))}, only {kernel['matrix']}")
    if kernel["kind"] == "memory" and not kernel["wide_loads"]:
        found.append("no 128-bit load")
    if kernel["kind"] == "stores" and not kernel["wide_stores"]:
        found.append("no 128-bit store")
    return [f"sm_{arch} {kernel['case']}: {kernel['kernel']}: {problem}" for problem in found]


def check(arch: int, table: str, cache: Path) -> dict[str, Any]:
    """Fails unless every kernel is well, and every row of the table was compiled."""
    found: dict[str, Any] = compile_all(arch, table, cache)
    problems = [problem for kernel in found["kernels"] for problem in complaints(kernel, arch)]
    assert not problems, "\n".join(problems)
    kernels = tuning.own_kernels(table) - (EIGHT_BITS if arch < 89 else set())
    committed = {
        (kernel, row) for kernel in kernels for row in range(len(tuning.read_table(table)[kernel]))
    }
    compiled = {(kernel, row) for kernel, row in found["rows"]}
    assert not committed - compiled, "rows of the table that no case compiles"
    return found
