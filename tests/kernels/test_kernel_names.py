"""`kineticlip_kernels.<op>`: there without being imported, and what the rooms give."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch

import kineticlip_kernels
from kineticlip_kernels import attention, norm
from kineticlip_kernels.examples import examples

ROOMS = ("attention", "evl", "fp8", "head", "mlp", "norm", "patches", "temporal")


def test_all_is_what_is_there() -> None:
    found = {name: getattr(kineticlip_kernels, name) for name in kineticlip_kernels.__all__}
    assert {name for name, value in found.items() if isinstance(value, ModuleType)} == {*ROOMS}
    assert kineticlip_kernels.__all__ == sorted(found)
    assert set(found) <= set(dir(kineticlip_kernels))
    assert found["layer_norm"] is norm.layer_norm


def test_every_op_is_in_all_but_the_one_named_like_its_room() -> None:
    ops = {example.op for example in examples(torch.device("cpu"), torch.float32).values()}
    public = {getattr(kineticlip_kernels, name) for name in kineticlip_kernels.__all__}
    assert ops - public == {attention.attention}


@pytest.mark.parametrize("room", ROOMS)
def test_all_of_a_room_is_there(room: str) -> None:
    module = getattr(kineticlip_kernels, room)
    public = {name for name, value in vars(module).items() if isinstance(value, FunctionType)}
    assert public <= set(module.__all__) <= set(vars(module))


def test_other_names_are_an_error() -> None:
    with pytest.raises(AttributeError, match="'kineticlip_kernels' has no attribute 'nothing'"):
        _ = kineticlip_kernels.nothing  # type: ignore[attr-defined]  # what is tested


LAZY = """
import sys
import kineticlip_kernels
assert not {"torch", "triton", "numpy"} & set(sys.modules)
room = kineticlip_kernels.attention
from kineticlip_kernels.attention import attention
assert kineticlip_kernels.attention is room and room.attention is attention
assert kineticlip_kernels.class_attention is room.class_attention
assert "triton" not in sys.modules
"""


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_example_of_the_readme_runs() -> None:
    text = (Path(__file__).parents[2] / "kernels/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["stream"].shape == names["normed"].shape == (8, 577, 1024)
