"""A pytest plugin that writes down what happens as it happens: a run may end at any moment.

    python -m pytest -p run_parts --parts DIR ...

DIR/tests.jsonl has a line for every test that is over, DIR/rows.jsonl for every case measured.
Several processes may write there at once. kernel_results.py makes one result file of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parts", type=Path, help="folder for what is measured, line by line")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--parts")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(Outcomes(folder), "outcomes")


class Outcomes:
    """What becomes of the session's tests, of every folder: a conftest's hooks see its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.note(report.nodeid, report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.note(report.nodeid, "failed")

    def note(self, node: str, outcome: str) -> None:
        append(self.folder / "tests.jsonl", {"node": node, "outcome": outcome})


def append(path: Path, record: dict[str, Any]) -> None:
    """One line, in one write, so that processes do not mix theirs."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def lines(path: Path) -> list[dict[str, Any]]:
    """What was appended; nothing where nothing was."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
