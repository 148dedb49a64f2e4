"""Whether Inductor can compile is told beforehand, with what to install."""

from __future__ import annotations

import sysconfig

import pytest
from torch._inductor import config as inductor

from kineticlip.runtime.compiler import why_no_compiler


def test_no_compiler() -> None:
    with inductor.patch({"cpp.cxx": "no-such-compiler"}):  # PATH is searched once, and not again
        assert why_no_compiler() == "no C++ compiler: install the package g++"


@pytest.mark.needs_compiler
def test_no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: f"/nowhere/{name}")
    reason = "no Python.h in /nowhere/include: install the package python3-dev"
    assert why_no_compiler() == reason
