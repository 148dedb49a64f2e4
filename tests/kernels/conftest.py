"""Kernel tests: the repaired interpreter where there is no GPU, and poisoned outputs everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kineticlip_kernels import launch

# On a GPU the kernels are compiled, and nothing is interpreted that could be tested.
collect_ignore = ["test_interpreter_shim.py"] if torch.cuda.is_available() else []

if not torch.cuda.is_available():
    import interpreter_shim

    interpreter_shim.install()


@pytest.fixture
def compiled(pytestconfig: pytest.Config, tmp_path: Path) -> Path:
    """Where Triton keeps what it compiled: pytest's cache, where that is on."""
    cache = getattr(pytestconfig, "cache", None)
    return tmp_path if cache is None else cache.mkdir("triton")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is to fill starts as NaN, or as the largest integer."""

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        memory = torch.empty(shape, dtype=dtype, device=device)
        if dtype == torch.float8_e4m3fn:
            memory.view(torch.uint8).fill_(0x7F)  # its NaN
        elif dtype.is_floating_point:
            memory.fill_(float("nan"))
        else:
            memory.fill_(torch.iinfo(dtype).max)
        return memory

    monkeypatch.setattr(launch, "empty", empty)
