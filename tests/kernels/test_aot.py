"""Every kernel in every committed configuration, compiled for A100s and for Blackwell.

What a launch would load is inspected: no spilled registers, no more shared memory than a block
can have, tensor-core instructions where products bound a kernel, 128-bit accesses where memory
does. test_aot_hopper.py does the same for sm_90; two files, because they share two processes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kineticlip_kernels.aot.checks import TARGETS, compile_all, problems


@pytest.mark.parametrize(("arch", "table"), [target for target in TARGETS if target[0] != 90])
def test_kernels_compile_well(arch: int, table: str, compiled: Path) -> None:
    found = compile_all(arch, table, compiled)
    assert found["kernels"] and problems(found, arch, table) == []
