"""Every kernel in every committed configuration, compiled for three generations of GPUs.

What a launch would load is inspected: no spilled registers, no more shared memory than a block
can have, tensor-core instructions where products bound a kernel, 128-bit accesses where memory
does. `aot_compile.py` prints the same as a table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kineticlip_kernels import tuning

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# sm_90 is what the default table was written for; other tables name one GPU, all of them sm_90.
TARGETS = [(80, "default"), (90, "default"), (100, "default")]
TARGETS += [(90, name) for name in tuning.tables() if name not in ("default", "interpreter")]


@pytest.mark.parametrize(("arch", "table"), TARGETS)
def test_kernels_compile_well(arch: int, table: str, pytestconfig: pytest.Config) -> None:
    found = compile_all(arch, table, pytestconfig.cache.mkdir("triton"))
    problems = [problem for kernel in found["kernels"] for problem in complaints(kernel, arch)]
    assert not problems, "\n".join(problems)
    rows = {(kernel, row) for kernel, row in found["rows"]}
    committed = {
        (kernel, row)
        for kernel in tuning.own_kernels(table)
        for row in range(len(tuning.read_table(table)[kernel]))
    }
    if arch >= 90:  # older ones leave e4m3 out
        assert not committed - rows, "rows of the table that no case compiles"


def complaints(kernel: dict[str, Any], arch: int) -> list[str]:
    found = []
    if kernel["stack"]:
        found.append(f"spills: {kernel['stack']} bytes of stack")
    if kernel["shared"] > SHARED_LIMIT[arch]:
        found.append(f"shared memory {kernel['shared']} of {SHARED_LIMIT[arch]} bytes")
    if kernel["kind"] == "matrix" and TENSOR_CORES[arch] not in kernel["matrix"]:
        found.append(f"no {TENSOR_CORES[arch]}, only {kernel['matrix']}")
    if kernel["kind"] == "memory" and not kernel["wide"]:
        found.append("no 128-bit access")
    return [f"sm_{arch} {kernel['case']}: {kernel['kernel']}: {problem}" for problem in found]


def compile_all(arch: int, table: str, cache: Path) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    cases = sorted(map(str, HERE.glob("aot_cases_*.py")))
    done = subprocess.run(
        [sys.executable, str(HERE / "aot_compile.py"), "--json", str(arch), table, *cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report
