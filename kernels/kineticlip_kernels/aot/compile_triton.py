"""Compiles kernels for GPUs that are not there, and reports what the assembler made of them.

    python -m kineticlip_kernels.aot.compile_triton ARCH TABLE CASES...

A stand-in driver names the target, launches become compilations, and the ops run on meta tensors:
what is compiled is what a launch at those shapes would compile. CASES are modules: see cases/.
Prints JSON. Runs in its own process, without TRITON_INTERPRET; checks.py starts it and judges what
it finds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kineticlip_kernels import tuning

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Of tensor cores, in PTX and in machine code; wgmma becomes HGMMA, or QGMMA in 8 bits.
MATRIX = r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma|HGMMA|QGMMA|HMMA|QMMA)\b"
WIDE_LOAD = r"ld\.global\S*\.v4\.b32$|cp\.async\.cg\b|(LDG|LDGSTS)\.\S*\b128$|UTMALDG"
WIDE_STORE = r"st\.global\S*\.v4\.b32$|STG\.\S*\b128$"
# A product of 8 bits in Triton's own code for sm_90: its accumulator, attributes and depth.
E4M3_PRODUCT = re.compile(
    r"warp_group_dot \S+, \S+, (\S+?)(?: \{(.*?)\})? : \S+?<\d+x(\d+)xf8E4M3FN"
)
ENDLESS = 1 << 30


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
            if recorder.last and recorder.last not in recorder.own:
                return None
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            room = function.module.removeprefix("kineticlip_kernels.")
            name = f"{room}.{function.__name__}"
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


def load(arch: int, names: Sequence[str]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The CASES for arch and KINDS of all modules, which must not repeat a case."""
    cases: dict[str, Callable[[], Any]] = {}
    kinds: dict[str, str] = {}
    for module in map(importlib.import_module, names):
        assert not cases.keys() & module.CASES.keys()
        oldest = getattr(module, "MIN_ARCH", {})
        cases |= {name: run for name, run in module.CASES.items() if arch >= oldest.get(name, 0)}
        kinds |= module.KINDS
    return cases, kinds


def report(case: str, name: str, kernel: Any, kind: str) -> dict[str, Any]:
    """Registers, spills and instructions of one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        counts = instructions(kernel, file.name)
    return {
        "case": case,
        "kernel": name,
        "kind": kind,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),  # where spilled registers go, in bytes
        "shared": kernel.metadata.shared,
        "matrix": _matching(MATRIX, counts),
        "e4m3_sum": e4m3_sum(kernel.asm["ttgir"]),
        "wide_loads": sum(_matching(WIDE_LOAD, counts).values()),
        "wide_stores": sum(_matching(WIDE_STORE, counts).values()),
    }


def instructions(kernel: Any, cubin: str) -> dict[str, int]:
    """How often each instruction stands in a kernel: of the machine code on sm_90, else of PTX.

    nvdisasm takes 0.3 s a kernel, as long as compiling it, so the other targets go without, and
    a count is kept beside what Triton keeps. There mma.sync, tcgen05.mma and v4.b32 become HMMA,
    UTCHMMA and 128 bits one for one.
    """
    if kernel.metadata.target.arch != 90:
        return Counter(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]+)", kernel.asm["ptx"], re.M))
    folder = os.environ.get("TRITON_CACHE_DIR")
    kept = Path(folder, f"{kernel.hash}.counts.json") if folder else None
    if kept is not None and kept.exists():
        found: dict[str, int] = json.loads(kept.read_text())
        return found
    code = _tool("nvdisasm", "-c", cubin)
    counts = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", code, re.M))
    if kept is not None:
        kept.write_text(json.dumps(counts))
    return counts


def e4m3_sum(code: str) -> int:
    """How many e4m3 products sm_90 may add up, with fewer bits than fp32, before fp32 takes over.

    Triton adds the sum to an fp32 one every maxNumImpreciseAcc products where that is no more
    than the product's depth. Otherwise it grows without end, unless it starts from zeros each
    time and is added to another by the kernel itself. 0: no such product.
    """
    zeros = re.findall(r"(%\S+) = arith\.constant dense<0\.0+e\+00> : tensor<", code)
    longest = 0
    for accumulator, attributes, depth in E4M3_PRODUCT.findall(code):
        found = re.search(r"maxNumImpreciseAcc = (\d+)", attributes)
        limit = int(found[1]) if found else 0
        if limit > int(depth):
            limit = int(depth) if accumulator in zeros else ENDLESS
        longest = max(longest, limit, 32)  # one instruction's
    return longest


def _tool(name: str, *arguments: str) -> str:
    """What one of the programs that come with Triton prints."""
    done = subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def _matching(pattern: str, counts: Mapping[str, int]) -> dict[str, int]:
    """Occurrences of each pattern's match, over all instructions that have one at the start."""
    total: Counter[str] = Counter()
    for instruction, count in counts.items():
        found = re.match(pattern, instruction)
        if found:
            total[found[0]] += count
    return dict(total)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


def compile_all(arch: int, table: str, modules: Sequence[str]) -> dict[str, Any]:
    """{"kernels": reports, "rows": the table rows that were read}."""
    driver.set_active(StandInDriver(arch))
    cases, kinds = load(arch, modules)
    recorder = Recorder(table)
    recorder.install()
    for recorder.case, run in cases.items():
        recorder.last = ""
        run()
    found = [(*entry, kinds[entry[1]]) for entry in recorder.kernels.values()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = list(pool.map(report, *zip(*found, strict=True)))
    return {"kernels": kernels, "rows": sorted(recorder.rows)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=int)
    parser.add_argument("table")
    parser.add_argument("cases", nargs="+")
    args = parser.parse_args()
    json.dump(compile_all(args.arch, args.table, args.cases), sys.stdout)


if __name__ == "__main__":
    main()
