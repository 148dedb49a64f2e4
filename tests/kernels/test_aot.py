"""Every kernel in every committed configuration, compiled for A100s and for Blackwell.

What a launch would load is inspected: no spilled registers, no more shared memory than a block
can have, tensor-core instructions where products bound a kernel, 128-bit accesses where memory
does. test_aot_hopper.py does the same for sm_90; two files, because they share two processes.
"""

from __future__ import annotations

import pytest
from aot_checks import check


@pytest.mark.parametrize("arch", [80, 100])
def test_kernels_compile_well(arch: int, pytestconfig: pytest.Config) -> None:
    assert check(arch, "default", pytestconfig.cache.mkdir("triton"))["kernels"]
