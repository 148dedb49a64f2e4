"""Choosing a face, the tolerance rule, the tables of block sizes, and life without Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from kernel_rig import BF16, FP16, FP32

from kineticlip_kernels import tolerance, tuning
from kineticlip_kernels.dispatch import (
    UnsupportedInput,
    choose,
    dtype_name,
    matrix_reasons,
    triton_reasons,
)
from kineticlip_kernels.norm import layer_norm
from kineticlip_kernels.tolerance import compare, verify

CPU = torch.device("cpu")


def test_auto_runs_the_fast_face_unless_there_is_a_reason() -> None:
    assert choose("op", "auto", []) == "triton"
    assert choose("op", "auto", ["x is on cpu"]) == "reference"
    assert choose("op", "reference", ["x is on cpu"]) == "reference"
    assert choose("op", "sdpa", [], fast="sdpa", known=("auto", "sdpa")) == "sdpa"


def test_a_face_asked_for_by_name_says_every_reason() -> None:
    with pytest.raises(UnsupportedInput) as caught:
        choose("layer_norm", "triton", ["x is on cpu", "x is fp64"])
    assert str(caught.value) == (
        "layer_norm: impl='triton' cannot run: x is on cpu; x is fp64; impl='auto' takes reference"
    )
    with pytest.raises(UnsupportedInput, match="unknown impl 'cuda'; known: auto, reference, t"):
        choose("layer_norm", "cuda", [])


def test_the_interpreter_is_only_used_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 4)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_reasons("triton", x=x) == []
    assert triton_reasons("auto", x=x) == ["x is on cpu"]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton_reasons("triton", x=x) == ["x is on cpu"]
    assert "x is fp32, and its products need 16 bits" in matrix_reasons("triton", x=x)
    assert triton_reasons("triton", x=x.double())[-1] == "x is fp64 (supported: fp32, fp16, bf16)"


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "bf16"), (torch.int32, "int32")])
def test_dtype_names(dtype: torch.dtype, name: str) -> None:
    assert dtype_name(dtype) == name


WITHOUT_TRITON = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import importlib, json, pkgutil, torch, kineticlip_kernels
modules = pkgutil.walk_packages(kineticlip_kernels.__path__, "kineticlip_kernels.")
plain = [m.name for m in modules if not m.name.endswith("_triton")]
for name in plain:
    importlib.import_module(name)
from kineticlip_kernels.norm import layer_norm
y = layer_norm(torch.ones(2, 4), torch.ones(4), torch.zeros(4))
try:
    layer_norm(torch.ones(2, 4), torch.ones(4), torch.zeros(4), impl="triton")
except ValueError as error:
    print(json.dumps([plain, y.sum().item(), str(error)]))
"""


def test_everything_but_the_kernels_works_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    modules, total, message = json.loads(done.stdout)
    rooms = {"norm", "mlp", "attention", "fp8", "patches", "head"}
    assert {f"kineticlip_kernels.{room}" for room in rooms} <= set(modules)
    assert total == 0.0
    assert message.startswith("layer_norm: impl='triton' cannot run: triton is not installed")


def test_tolerance_compares_with_what_plain_pytorch_achieves() -> None:
    truth = torch.tensor([1.0, 100.0], dtype=torch.float64)
    baseline = torch.tensor([1.0, 100.5], dtype=FP16)
    allowed = 2 * 0.5 + 1e-4 * 100
    assert compare("y", baseline, baseline, truth).bound == pytest.approx(allowed)
    assert compare("y", baseline + 0.5, baseline, truth).passed
    assert not compare("y", baseline + 1, baseline, truth).passed


def test_tolerance_never_lets_a_gap_pass() -> None:
    truth = torch.zeros(2, dtype=torch.float64)
    gap = torch.tensor([0.0, float("nan")])
    result = compare("y", gap, torch.zeros(2), truth)
    assert not result.passed and str(result) == "y: error inf, allowed 0: FAILED"
    with pytest.raises(AssertionError, match=r"expected \(2,\) torch.float32"):
        compare("y", gap.double(), gap, truth)


def test_verify_finds_a_wrong_gradient() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return 2.001 * grad

    def wrong(x: torch.Tensor) -> Any:
        return Wrong.apply(x)

    inputs = {"x": torch.ones(3, requires_grad=True)}
    results = {r.name: r.passed for r in verify(lambda x: 2 * x, wrong, inputs)}
    assert results == {"output 0": True, "grad x": False}


def test_tables_give_the_first_row_that_covers_the_sizes() -> None:
    narrow = tuning._find("default", "layer_norm_forward", (("row_bytes", 2048),))
    wide = tuning._find("default", "layer_norm_forward", (("row_bytes", 2049),))
    assert narrow["BLOCK_ROWS"] > wide["BLOCK_ROWS"]
    assert not any(key.startswith("max_") for key in narrow)
    assert tuning.table_name(CPU) == "interpreter"
    with pytest.raises(KeyError, match="no_such_kernel"):
        tuning.blocks("no_such_kernel", CPU)


def test_every_table_has_rows_for_every_kernel() -> None:
    default = tuning.read_table("default")
    assert tuning.read_table("interpreter").keys() == default.keys()
    for name in tuning.tables():
        table = tuning.read_table(name)
        assert table.keys() == default.keys(), name
        for kernel, rows in table.items():
            conditions = [any(key.startswith("max_") for key in row) for row in rows]
            assert conditions == [True] * (len(rows) - 1) + [False], f"{name}: {kernel}"


def test_a_device_table_is_found_by_a_word_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.table_name.cache_clear()
    for device_name, table in {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "default"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, n=device_name: n)
        assert tuning.table_name(torch.device("cuda", 0)) == table
        tuning.table_name.cache_clear()


def test_reference_is_what_auto_runs_on_a_cpu() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    expected = torch.nn.functional.layer_norm(x, (8,), weight, bias)
    assert torch.equal(layer_norm(x, weight, bias), expected)
    assert tolerance.FLOOR[FP32] < tolerance.FLOOR[FP16] < tolerance.FLOOR[BF16]
