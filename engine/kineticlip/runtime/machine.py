"""Clocks, and the record of the machine that every number is kept with."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kineticlip.runtime.version import __version__

SOFTWARE = (
    "torch", "torchvision", "triton", "xformers", "deepspeed", "open_clip_torch", "torchcodec",
    "av", "nvidia-dali-cuda130", "numpy", "pillow",
)  # fmt: skip
_GPU_FIELDS = ("name", "memory.total", "power.limit", "clocks.max.sm", "driver_version")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of repeated calls: the least, percentiles 20, 50 and 80, and how many calls."""

    least: float
    p20: float
    p50: float
    p80: float
    calls: int


def time_calls(call: Callable[[], Any], *, warmup: int = 3, repeats: int = 20) -> Timing:
    """Times a function call by call; on a GPU by events, queued without a pause in between.

    Raises ValueError for fewer than one repeat.
    """
    import torch

    if repeats < 1:
        raise ValueError(f"time_calls: repeats should be at least 1, got {repeats}")
    for _ in range(warmup):
        call()
    if torch.cuda.is_available():
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
        spans = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    else:
        ticks = [time.perf_counter()]
        for _ in range(repeats):
            call()
            ticks.append(time.perf_counter())
        spans = [1000 * (after - before) for before, after in itertools.pairwise(ticks)]
    spans.sort()
    p20, p50, p80 = (spans[min(int(share * repeats), repeats - 1)] for share in (0.2, 0.5, 0.8))
    return Timing(least=spans[0], p20=p20, p50=p50, p80=p80, calls=repeats)


def machine_record() -> dict[str, Any]:
    """CPU, memory and GPUs of this machine, plain data; `gpus` is empty where there is none."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
    }


def software_record() -> dict[str, Any]:
    """Versions, and the commit where the engine runs from a git checkout (else None).

    dirty: whether tracked files differ from that commit.
    """
    record: dict[str, Any] = {"python": platform.python_version(), "kineticlip": __version__}
    for name in SOFTWARE:
        try:
            record[name] = version(name)
        except PackageNotFoundError:
            record[name] = None
    here = Path(__file__).resolve().parent
    tracked = _output("git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name)
    record["commit"] = _output("git", "-C", str(here), "rev-parse", "HEAD") if tracked else None
    record["dirty"] = (
        bool(_output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"))
        if tracked
        else None
    )
    return record


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return round(pages / 2**30, 1)


def _gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU, with its units; asks nothing where it is absent."""
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    lines = _output("nvidia-smi", query, "--format=csv,noheader")
    names = [field.replace(".", "_") for field in _GPU_FIELDS]
    return [
        dict(zip(names, (value.strip() for value in line.split(",")), strict=True))
        for line in lines.splitlines()
    ]


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return ""
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.stdout.strip() if ran.returncode == 0 else ""
