"""PyTorch's matrix products at the four shapes of a block: the floor under everything fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench import SHAPES, Case, Shape, randn, spread
from kineticlip_kernels import cost

# name -> (depth, width), in units of D
PRODUCTS = {"qkv": (1, 3), "out": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}


def add_product(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """The residual addition in cuBLAS's epilogue; the bias would wait for the next LayerNorm."""
    return torch.addmm(residual, x, weight.t())


def products(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    for name, (depth, width) in PRODUCTS.items():
        size = (shape.rows, depth * shape.width, width * shape.width)
        case = partial(Case, dtype=dtype, shape=shape, short=shape == SHAPES[0])
        count = cost.linear(*size, dtype.itemsize)
        make = partial(operands, *size, dtype=dtype)
        yield case(op=f"gemm {name}", impl="linear", cost=count, make=make, run=F.linear)
        if name in ("out", "fc2"):
            more = cost.Cost(0, size[0] * size[2] * dtype.itemsize)
            make = partial(operands, *size, dtype=dtype, residual=True)
            yield case(
                op=f"gemm {name} + residual",
                impl="addmm",
                cost=count + more,
                make=make,
                run=add_product,
            )


def operands(
    rows: int, depth: int, width: int, *, dtype: torch.dtype, residual: bool = False
) -> tuple[Tensor, ...]:
    last = (rows, width) if residual else (width,)
    x, weight = randn(rows, depth, dtype=dtype), randn(width, depth, dtype=dtype, scale=depth**-0.5)
    return x, weight, randn(*last, dtype=dtype)


CASES = spread(products)


def test_gemm(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["p50_ms"] > 0
