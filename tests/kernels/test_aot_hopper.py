"""Every kernel in every committed configuration, compiled for sm_90, down to the machine code.

sm_90 is what the default table was written for; tables of one GPU are all of it too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import kineticlip_kernels
from kineticlip_kernels.aot.checks import TARGETS, compile_all, complaints, problems
from kineticlip_kernels.aot.report import as_table

TABLES = [table for arch, table in TARGETS if arch == 90]


@pytest.mark.parametrize("table", TABLES)
def test_kernels_compile_well(table: str, compiled: Path) -> None:
    found = compile_all(90, table, compiled)
    assert problems(found, 90, table) == []
    lines = as_table(found["kernels"]).splitlines()
    cases = {kernel["case"] for kernel in found["kernels"]}
    assert len(lines) == 1 + len(cases) + len(found["kernels"]) and max(map(len, lines)) <= 110
    if table == "default":
        assert {kernel["kernel"] for kernel in found["kernels"]} == launched()


def launched() -> set[str]:
    """module.kernel of every `kernel[grid](...)` in the package's sources."""
    names = set()
    for folder in kineticlip_kernels.__path__:
        for path in Path(folder).rglob("*_triton.py"):
            found = re.findall(r"^ +(_\w+)\[.+\]\(", path.read_text(), re.M)
            names |= {f"{path.parent.name}.{path.stem}.{name}" for name in found}
    return names


def test_the_checks_can_fail(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    found = compile_all(90, "default", compiled, ["bad_kernels"])
    problems = {kernel["case"]: complaints(kernel, 90) for kernel in found["kernels"]}
    assert problems.pop("good") == []
    expected = {
        "spills": "spills: ",
        "too much shared memory": "shared memory ",
        "endless 8-bit sum": "sums of 1073741824 e4m3 products outside fp32",
        "no tensor cores": "no HGMMA or QGMMA, only {}",
        "narrow loads": "no 128-bit load",
        "narrow stores": "no 128-bit store",
    }
    assert problems.keys() == expected.keys()
    for case, (problem,) in problems.items():
        assert expected[case] in problem
