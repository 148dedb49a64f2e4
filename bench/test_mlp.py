"""QuickGELU behind a bias and in the epilogue of a GEMM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench import GPU, SHAPES, Case, Shape, randn, rivals, spread
from kineticlip_kernels import cost, mlp, tuning


def bias_quick_gelu(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    faces = rivals(
        mlp.bias_quick_gelu_reference, triton=partial(mlp.bias_quick_gelu, impl="triton")
    )

    def make(grad: bool) -> tuple[Tensor, ...]:
        width = 4 * shape.width
        x = randn(shape.images, shape.tokens, width, dtype=dtype, grad=grad)
        return x, randn(width, dtype=dtype, grad=grad)

    count = partial(cost.bias_quick_gelu, shape.rows, 4 * shape.width, dtype.itemsize)
    yield from both("bias_quick_gelu", faces, count, make, shape, dtype)


def then_pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """cuBLAS without the bias, and one kernel for the rest."""
    return mlp.bias_quick_gelu(F.linear(x, weight), bias, impl="triton")


def in_tiles(x: Tensor, weight: Tensor, bias: Tensor, *, blocks: tuple[int, ...]) -> Tensor:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages")
    with tuning.trial("linear_quick_gelu", dict(zip(names, blocks, strict=True))):
        return mlp.linear_quick_gelu(x, weight, bias, impl="triton")


# Beside the table's own tiles; all without spills on sm_90.
TILES = [(128, 128, 64, 8, 4, 3), (128, 128, 64, 8, 8, 4), (256, 128, 64, 8, 8, 3)]


def linear_quick_gelu(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    faces = rivals(
        mlp.linear_quick_gelu_reference,
        triton=partial(mlp.linear_quick_gelu, impl="triton"),
        cublas_then_triton=then_pointwise,
    )
    if GPU and shape == SHAPES[0] and dtype == torch.bfloat16:
        for blocks in TILES:
            m, n, k, _, warps, stages = blocks
            name = f"triton {m}x{n}x{k} w{warps} s{stages}"
            faces[name] = partial(in_tiles, blocks=blocks)

    def make(grad: bool) -> tuple[Tensor, ...]:
        width = shape.width
        x = randn(shape.images, shape.tokens, width, dtype=dtype, grad=grad)
        weight = randn(4 * width, width, dtype=dtype, scale=width**-0.5, grad=grad)
        return x, weight, randn(4 * width, dtype=dtype, grad=grad)

    count = partial(
        cost.linear_quick_gelu, shape.rows, shape.width, 4 * shape.width, dtype.itemsize
    )
    yield from both("linear_quick_gelu", faces, count, make, shape, dtype)


def both(
    op: str,
    faces: dict[str, Callable[..., Any]],
    count: Callable[..., cost.Cost],
    make: Callable[[bool], tuple[Tensor, ...]],
    shape: Shape,
    dtype: torch.dtype,
) -> Iterator[Case]:
    """Forward, and forward with backward, of every face; other tiles forward only."""
    for impl, face in faces.items():
        case = partial(Case, op=op, impl=impl, dtype=dtype, shape=shape)
        short = op == "linear_quick_gelu" and shape == SHAPES[0] and dtype == torch.bfloat16
        yield case(cost=count(), make=partial(make, False), run=face, short=short)
        if not impl.startswith("triton "):
            yield case(
                cost=count() + count(backward=True),
                make=partial(make, True),
                run=face,
                direction="forward+backward",
            )


CASES = spread(bias_quick_gelu, linear_quick_gelu)


def test_mlp(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["p50_ms"] > 0
