"""What the compilation tests share: compiling for a target, and what is wrong with a kernel.

    python aot_checks.py [--json]

prints every kernel of every target and what is wrong with it; it is `kineticlip bench --aot`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kineticlip_kernels import tuning

HERE = Path(__file__).parent
# sm_90 is what the default table was written for; other tables name one GPU, all of them sm_90.
TARGETS = [(80, "default"), (90, "default"), (100, "default")]
TARGETS += [(90, name) for name in tuning.tables() if name not in ("default", "interpreter")]
CASES = sorted(HERE.glob("aot_cases_*.py"))
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have
TENSOR_CORES = {80: {"mma.sync"}, 90: {"HGMMA", "QGMMA"}, 100: {"tcgen05.mma"}}
LONGEST_SUM = 128  # of e4m3 products: what cuBLAS adds up without its fast accumulation
# Kernels without a row for sm_80: e4m3 began with sm_89.
EIGHT_BITS = {"quantize_rows", "linear_fp8"}


def compile_all(arch: int, table: str, cache: Path, cases: Sequence[Path] = CASES) -> Any:
    """What aot_compile.py reports, from a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(HERE / "aot_compile.py"), str(arch), table]
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
    if kernel["e4m3_sum"] > LONGEST_SUM:
        found.append(f"sums of {kernel['e4m3_sum']} e4m3 products outside fp32")
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


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    documents, failed = [], False
    with tempfile.TemporaryDirectory() as scratch:
        for arch, table in TARGETS:
            print(f"compiling for sm_{arch}, table {table} ...", file=sys.stderr, flush=True)
            kernels = compile_all(arch, table, Path(scratch))["kernels"]
            problems = [problem for kernel in kernels for problem in complaints(kernel, arch)]
            failed = failed or bool(problems)
            documents.append(
                {"arch": arch, "table": table, "kernels": kernels, "problems": problems}
            )
            if not args.json:
                print(
                    f"sm_{arch}, table {table}: {len(kernels)} kernels", as_table(kernels), sep="\n"
                )
                print("\n".join(problems) or "nothing wrong", end="\n\n", flush=True)
    if args.json:
        json.dump(documents, sys.stdout)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
