"""Runs kernel benchmark cases, prints a table, and writes one result file.

    python -m pytest bench --benchmark-only [--results bench/results] [--allow-dirty] [-m short]

Cases marked short run first: they answer the questions that order the rest. Tests that run in the
same session (bench/gpu.sh gives tests/kernels too) are counted in the result file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kernel_bench
import kernel_results
from kernel_bench import Case
from kineticlip.measure import software_record
from kineticlip_kernels import tuning
from kineticlip_kernels.dispatch import dtype_name

rows: list[dict[str, Any]] = []


class Outcomes:
    """What became of the session's tests, of other folders too: a conftest's hooks see its own."""

    def __init__(self) -> None:
        self.nodes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome == "failed":
            self.nodes[report.outcome].append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.nodes["failed"].append(report.nodeid)

    def correctness(self) -> dict[str, Any]:
        """Counts of the tests that are no benchmarks, and the names of those that failed."""
        tests = {
            outcome: [node for node in nodes if not node.startswith("bench/")]
            for outcome, nodes in self.nodes.items()
        }
        return {
            "passed": len(tests["passed"]),
            "skipped": len(tests["skipped"]),
            "failed": tests["failed"],
        }


outcomes = Outcomes()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--results", type=Path, help="folder for the result file")
    group.addoption("--allow-dirty", action="store_true", help="also from a changed checkout")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "short: one of the few cases that are measured first")
    config.pluginmanager.register(outcomes, "outcomes")
    if config.getoption("--results", None) and not config.getoption("--allow-dirty"):
        if software_record()["dirty"]:
            raise pytest.UsageError(
                "--results: the checkout differs from its commit; commit, or --allow-dirty"
            )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> int:
        benchmark = "benchmark" in getattr(item, "fixturenames", ())
        return (2 if item.get_closest_marker("short") is None else 1) if benchmark else 0

    items.sort(key=order)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` runs over CASES of the module."""
    if "case" in metafunc.fixturenames:
        marked = [
            pytest.param(case, marks=[pytest.mark.short] if case.short else [], id=str(case))
            for case in metafunc.module.CASES
        ]
        metafunc.parametrize("case", marked)


@pytest.fixture
def measure(benchmark: Any) -> Callable[[Case], dict[str, Any]]:
    """Times a case, notes its row, and returns it."""

    def run(case: Case) -> dict[str, Any]:
        prepared = kernel_bench.prepare(case)
        # A round is many calls on a GPU, one on a CPU. The first one warms up: 20 ms at least.
        benchmark.pedantic(prepared.calls, rounds=7, warmup_rounds=2)
        seconds = benchmark.stats.stats.data
        row = kernel_bench.row(case, prepared, [1000 * s / prepared.count for s in seconds])
        benchmark.extra_info.update(row)
        rows.append(row)
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
    blocks = {"table": "none", "status": "no kernels run on a CPU"}
    if kernel_bench.GPU:
        table = tuning.table_name(kernel_bench.DEVICE)
        blocks = {"table": table, "status": tuning.status(table)}
    content = kernel_results.document(
        rows,
        limits={
            "copy_gb_per_s": kernel_bench.copy_limit() / 1e9,
            "matmul_tflop_per_s": {
                dtype_name(dtype): kernel_bench.matmul_limit(dtype) / 1e12
                for dtype in kernel_bench.DTYPES
            },
        },
        correctness=outcomes.correctness(),
        config={"blocks": blocks},
        complete=int(exitstatus) in (0, 1),
    )
    path = kernel_results.write(folder, content)
    print(f"\n{path}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not rows:
        return
    where = (
        torch.cuda.get_device_name() if kernel_bench.GPU else "the CPU, small shapes, no kernels"
    )
    terminalreporter.section(f"on {where}", sep="-")
    for row in rows:
        terminalreporter.write_line(
            f"{row['case']:<62} {row['impl']:<22} {row['p50_ms']:>9.4f} ms "
            f"{row['gb_per_s']:>7.0f} GB/s {row['tflop_per_s']:>7.1f} TFLOP/s "
            f"{row['percent_of_limit']:>4.0f} %"
        )
