"""Runs kernel benchmark cases, prints a table, and writes one result file.

    python -m pytest bench --benchmark-only [--results bench/results] [--allow-dirty] [-m short]

Cases marked short run first: they answer the questions that order the rest. bench/gpu.sh runs
several such processes, which leave their rows in one folder (--parts) for one result file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kernel_bench
import kernel_results
import run_parts
from kernel_bench import Case
from kineticlip.runtime.machine import software_record

rows: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.is_registered(run_parts):
        pluginmanager.register(run_parts, "run_parts")
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--results", type=Path, help="folder for the result file")
    group.addoption("--allow-dirty", action="store_true", help="also from a changed checkout")
    group.addoption("--warm", action="store_true", help="only compile: run cases once, untimed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "short: one of the few cases that are measured first")
    if config.getoption("--results", None) and not config.getoption("--allow-dirty"):
        if software_record()["dirty"]:
            raise pytest.UsageError(
                "--results: the checkout differs from its commit; commit, or --allow-dirty"
            )
    if config.getoption("--parts") is not None:
        kernel_bench.share_limits(config.getoption("--parts") / kernel_results.LIMITS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("short") is None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` runs over CASES of the module."""
    if "case" in metafunc.fixturenames:
        marked = [
            pytest.param(case, marks=[pytest.mark.short] if case.short else [], id=str(case))
            for case in metafunc.module.CASES
        ]
        metafunc.parametrize("case", marked)


@pytest.fixture
def measure(benchmark: Any, pytestconfig: pytest.Config) -> Callable[[Case], dict[str, Any]]:
    """Times a case, notes its row, and returns it."""

    def run(case: Case) -> dict[str, Any]:
        if pytestconfig.getoption("--warm"):
            benchmark.pedantic(lambda: kernel_bench.warm(case), rounds=1)
            return {"p50_ms": benchmark.stats.stats.median}
        prepared = kernel_bench.prepare(case)
        # A round is many calls on a GPU, one on a CPU. The first one warms up: 20 ms at least.
        benchmark.pedantic(prepared.calls, rounds=7, warmup_rounds=2)
        seconds = benchmark.stats.stats.data
        row = kernel_bench.row(case, prepared, [1000 * s / prepared.count for s in seconds])
        benchmark.extra_info.update(row)
        rows.append(row)
        parts = pytestconfig.getoption("--parts")
        if parts is not None:
            run_parts.append(parts / kernel_results.ROWS, row)
            kernel_bench.keep_limits(parts / kernel_results.LIMITS)
        return row

    return run


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    yield
    if kernel_bench.GPU:
        torch.cuda.empty_cache()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    folder = session.config.getoption("--results")
    if folder is None or not rows:
        return
    with tempfile.TemporaryDirectory() as scratch:
        parts = Path(scratch)
        kernel_bench.keep_limits(parts / kernel_results.LIMITS)
        for row in rows:
            run_parts.append(parts / kernel_results.ROWS, row)
        content = kernel_results.gather(parts, complete=int(exitstatus) == 0)
    print(f"\n{kernel_results.write(folder, content)}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not rows:
        return
    where = (
        torch.cuda.get_device_name() if kernel_bench.GPU else "the CPU, small shapes, no kernels"
    )
    terminalreporter.section(f"on {where}", sep="-")
    terminalreporter.write_line("median, memory traffic, arithmetic, % of the limit measured here")
    for line in kernel_results.table(rows):
        terminalreporter.write_line(line)
    if terminalreporter.config.getoption("--parts") is not None:
        return  # one of several processes; kernel_results.py says it once
    for rival, reason in kernel_bench.absent().items():
        terminalreporter.write_line(f"no rows of {rival}: {reason}")
