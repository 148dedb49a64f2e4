"""Compiling for a target, and what is wrong with a kernel."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kineticlip_kernels import tuning
from kineticlip_kernels.aot import cases

ROOT = Path(__file__).parents[2]  # what has to be on the path of the other process
# sm_90 is what the default table was written for; other tables name one GPU, all of them sm_90.
TARGETS = [(80, "default"), (90, "default"), (100, "default")]
TARGETS += [(90, name) for name in tuning.tables() if name not in ("default", "interpreter")]
CASES = sorted(f"{cases.__name__}.{module.name}" for module in pkgutil.iter_modules(cases.__path__))
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have
TENSOR_CORES = {80: {"mma.sync"}, 90: {"HGMMA", "QGMMA"}, 100: {"tcgen05.mma"}}
LONGEST_SUM = 128  # of e4m3 products: what cuBLAS adds up without its fast accumulation
# Kernels without a row for sm_80: e4m3 began with sm_89.
EIGHT_BITS = {"quantize_rows", "linear_fp8"}


def compile_all(arch: int, table: str, cache: Path, cases: Sequence[str] = CASES) -> dict[str, Any]:
    """What compile_triton.py reports of these modules, from a process without the interpreter.

    cache: where Triton keeps what it compiles. Raises RuntimeError with that process's stderr
    where it fails.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "kineticlip_kernels.aot.compile_triton", str(arch), table]
    done = subprocess.run(
        [*command, *cases], env=environment, capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"compiling for sm_{arch}, table {table}, failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def problems(found: dict[str, Any], arch: int, table: str) -> list[str]:
    """What is wrong with all that compile_all found, and the rows of the table that it left out."""
    wrong = [problem for kernel in found["kernels"] for problem in complaints(kernel, arch)]
    kernels = tuning.own_kernels(table) - (EIGHT_BITS if arch < 89 else set())
    rows = tuning.read_table(table)
    committed = {(kernel, row) for kernel in kernels for row in range(len(rows[kernel]))}
    compiled = {(kernel, row) for kernel, row in found["rows"]}
    left_out = sorted(committed - compiled)
    return wrong + [
        f"sm_{arch}: row {row} of {kernel} in table {table}: no case compiles it"
        for kernel, row in left_out
    ]


def complaints(kernel: dict[str, Any], arch: int) -> list[str]:
    """What is wrong with one compiled kernel."""
    found = []
    if kernel["stack"]:
        found.append(f"spills: {kernel['stack']} bytes of stack")
    if kernel["shared"] > SHARED_LIMIT[arch]:
        found.append(f"shared memory {kernel['shared']} of {SHARED_LIMIT[arch]} bytes")
    if kernel["kind"] == "matrix" and not TENSOR_CORES[arch] & kernel["matrix"].keys():
        found.append(f"no {' or '.join(sorted(TENSOR_CORES[arch]))}, only {kernel['matrix']}")
    if kernel["e4m3_sum"] > LONGEST_SUM:
        found.append(f"sums of {kernel['e4m3_sum']} e4m3 products outside fp32")
    if kernel["kind"] == "memory" and not kernel["wide_loads"]:
        found.append("no 128-bit load")
    if kernel["kind"] == "stores" and not kernel["wide_stores"]:
        found.append("no 128-bit store")
    return [f"sm_{arch} {kernel['case']}: {kernel['kernel']}: {problem}" for problem in found]
