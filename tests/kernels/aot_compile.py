"""Compiles kernels for GPUs that are not there, and reports what the assembler made of them.

    python aot_compile.py [--json] ARCH TABLE CASES.py...

A stand-in driver names the target, launches become compilations, and the ops run on meta tensors:
what is compiled is what a launch at those shapes would compile. A cases file has CASES, name ->
function without arguments that runs ops, and KINDS, kernel -> "memory" or "matrix": what bounds
it; MIN_ARCH, where there is one, names cases that older GPUs cannot run. Runs in its own process,
without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kineticlip_kernels import tuning

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class StandInDriver:
    """The little of a GPU driver that compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    @staticmethod
    def is_active() -> bool:
        return True


class Recorder:
    """Every kernel compiled and every table row read, by case."""

    def __init__(self, table: str) -> None:
        self.table, self.case = table, ""
        # Kernels that a GPU's table leaves out are the default's, which compiles them anyway.
        self.own, self.last = tuning.own_kernels(table), ""
        self.kernels: dict[str, tuple[str, str, Any]] = {}  # hash -> case, kernel, compiled
        self.rows: set[tuple[str, int]] = set()

    def install(self) -> None:
        run, recorder = JITFunction.run, self

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            if recorder.last not in recorder.own:
                return None
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            name = f"{function.module.rpartition('.')[2]}.{function.__name__}"
            recorder.kernels.setdefault(kernel.hash, (recorder.case, name, kernel))
            return kernel

        def blocks(kernel: str, device: torch.device, **sizes: int) -> tuning.Blocks:
            recorder.last = kernel
            row = tuning._find(recorder.table, kernel, tuple(sorted(sizes.items())))
            rows = tuning.read_table(recorder.table)[kernel]
            recorder.rows |= {
                (kernel, i) for i, other in enumerate(rows) if row.items() <= other.items()
            }
            return row

        JITFunction.run = compile_only
        tuning.table_name = lambda device: recorder.table  # type: ignore[assignment]
        original = tuning.blocks
        for module in list(sys.modules.values()):
            if getattr(module, "blocks", None) is original:
                module.blocks = blocks  # type: ignore[attr-defined]


def load(arch: int, paths: Sequence[str]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The CASES for arch and KINDS of all files, which must not repeat a case."""
    cases: dict[str, Callable[[], Any]] = {}
    kinds: dict[str, str] = {}
    for path in paths:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert not cases.keys() & module.CASES.keys()
        oldest = getattr(module, "MIN_ARCH", {})
        cases |= {name: run for name, run in module.CASES.items() if arch >= oldest.get(name, 0)}
        kinds |= module.KINDS
    return cases, kinds


def report(case: str, name: str, kernel: Any, kind: str) -> dict[str, Any]:
    """Registers, spills and instructions of one compiled kernel.

    Instructions are counted in PTX: disassembling the cubin takes longer than compiling it, and
    these become HMMA, HGMMA, UTCMMA and 128-bit LDG and STG one for one.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
    ptx = kernel.asm["ptx"]
    return {
        "case": case,
        "kernel": name,
        "kind": kind,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),  # where spilled registers go
        "shared": kernel.metadata.shared,
        "matrix": sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx))),
        "wide": len(re.findall(r"\b(?:ld|st)\.global\S*\.v4\.b32\b|\bcp\.async\.cg\b", ptx)),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


def compile_all(arch: int, table: str, paths: Sequence[str]) -> dict[str, Any]:
    """{"kernels": reports, "rows": the table rows that were read}."""
    driver.set_active(StandInDriver(arch))
    cases, kinds = load(arch, paths)
    recorder = Recorder(table)
    recorder.install()
    for recorder.case, run in cases.items():
        run()
    kernels = [report(*entry, kinds[entry[1]]) for entry in recorder.kernels.values()]
    return {"kernels": kernels, "rows": sorted(recorder.rows)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("arch", type=int)
    parser.add_argument("table")
    parser.add_argument("cases", nargs="+")
    args = parser.parse_args()
    found = compile_all(args.arch, args.table, args.cases)
    if args.json:
        json.dump(found, sys.stdout)
        return
    print(" | ".join(found["kernels"][0]))
    for kernel in found["kernels"]:
        print(" | ".join(str(value) for value in kernel.values()))


if __name__ == "__main__":
    main()
