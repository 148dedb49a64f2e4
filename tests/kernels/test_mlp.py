"""QuickGELU behind a bias and behind a linear layer: the Triton faces against the references."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from kernel_rig import BF16, DEVICE, DTYPES, MATRIX, MATRIX_DTYPES, check, on_gpu, randn, strided
from torch import Tensor

from kineticlip_kernels.dispatch import UnsupportedInput
from kineticlip_kernels.mlp import (
    bias_quick_gelu,
    bias_quick_gelu_reference,
    linear_quick_gelu,
    linear_quick_gelu_reference,
    quick_gelu,
)

bias_triton = partial(bias_quick_gelu, impl="triton")
linear_triton = partial(linear_quick_gelu, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(7, 50), (1, 32), (2, 3, 65), (0, 24), (577, 20), *on_gpu((1154, 4096))]
)
def test_bias_quick_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype, scale=3.0)
    bias = randn(shape[-1], dtype=dtype, seed=1)
    check(bias_quick_gelu_reference, bias_triton, x=x, bias=bias)


def linear_inputs(
    rows: tuple[int, ...], depth: int, width: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    weight = randn(width, depth, dtype=dtype, seed=1, scale=depth**-0.5)
    bias = randn(width, dtype=dtype, seed=2)
    return {"x": randn(*rows, depth, dtype=dtype), "weight": weight, "bias": bias}


# Depths: under, at and over a multiple of a block's 16; widths around its 32; rows around 16.
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize(
    ("rows", "depth", "width"),
    [
        ((33,), 40, 50),
        ((257,), 20, 33),
        ((2, 8), 32, 64),
        ((1,), 8, 16),
        ((0,), 16, 16),
        ((), 16, 20),
        *on_gpu(((2, 577), 1024, 4096), ((999,), 200, 1000)),
    ],
)
def test_linear_quick_gelu(
    rows: tuple[int, ...], depth: int, width: int, dtype: torch.dtype
) -> None:
    check(linear_quick_gelu_reference, linear_triton, **linear_inputs(rows, depth, width, dtype))


def test_rows_and_columns_with_gaps() -> None:
    inputs = linear_inputs((17,), 24, 40, MATRIX)
    inputs["x"] = strided(inputs["x"])
    check(linear_quick_gelu_reference, linear_triton, **inputs)
    check(bias_quick_gelu_reference, bias_triton, x=inputs["x"], bias=randn(24, dtype=MATRIX))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_frozen_parameters(wanted: str) -> None:
    inputs = linear_inputs((5,), 16, 20, BF16)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == wanted)
    check(linear_quick_gelu_reference, linear_triton, **inputs)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's exp, in the interpreter
def test_extreme_inputs_saturate() -> None:
    x = torch.tensor([[-1e4, -60.0, 0.0, 60.0, 1e4]], device=DEVICE)
    for face in ("reference", "triton"):
        y = bias_quick_gelu(x, torch.zeros(5, device=DEVICE), impl=face)
        assert torch.allclose(y, x.clamp(min=0), atol=1e-38), face


def test_reference_is_the_formula_with_and_without_gradients() -> None:
    x = randn(4, 30, dtype=torch.float64, scale=2.0)
    expected = x / (1 + torch.exp(-1.702 * x))
    assert torch.allclose(quick_gelu(x), expected, rtol=1e-14)
    with torch.no_grad():
        assert torch.allclose(quick_gelu(x), expected, rtol=1e-14)
    assert torch.autograd.gradcheck(quick_gelu, x)
    assert torch.autograd.gradcheck(bias_quick_gelu_reference, (x, x[0].detach().clone()))
    inputs = linear_inputs((3,), 4, 5, torch.float64)
    assert torch.autograd.gradcheck(linear_quick_gelu_reference, tuple(inputs.values()))


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_operands_that_do_not_fit_are_refused(impl: Any) -> None:
    """Kernels would read past the end of the shorter one, or give part of the product."""
    x, weight, bias = (randn(*shape, dtype=MATRIX) for shape in ((4, 16), (24, 16), (24,)))
    for other in (bias[:1], bias[:15], bias):
        with pytest.raises(UnsupportedInput, match=r"^bias_quick_gelu: x is \(4, 16\) and bias"):
            bias_quick_gelu(x, other, impl=impl)
    for wrong in [(x, randn(24, 32, dtype=MATRIX), bias), (x, weight, bias[:23]), (x, bias, bias)]:
        with pytest.raises(UnsupportedInput, match=r"^linear_quick_gelu: x is .*expected"):
            linear_quick_gelu(*wrong, impl=impl)
