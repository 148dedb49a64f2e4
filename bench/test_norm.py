"""LayerNorm, alone and with the residual addition before it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kernel_bench import GPU, Case, Shape, installed, randn, rivals, spread
from kineticlip_kernels import cost, norm


def layer_norm(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    faces = rivals(norm.layer_norm_reference, triton=partial(norm.layer_norm, impl="triton"))
    if GPU and installed("liger"):
        faces["liger"] = importlib.import_module(
            "liger_kernel.transformers.functional"
        ).liger_layer_norm
    yield from both("layer_norm", faces, cost.layer_norm, 1, shape, dtype)


def add_layer_norm(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    face = partial(norm.add_layer_norm, impl="triton")
    faces = rivals(norm.add_layer_norm_reference, triton=face)
    yield from both("add_layer_norm", faces, cost.add_layer_norm, 2, shape, dtype)


def both(
    op: str,
    faces: dict[str, Callable[..., Any]],
    count: Callable[..., cost.Cost],
    streams: int,
    shape: Shape,
    dtype: torch.dtype,
) -> Iterator[Case]:
    """Forward, and forward with backward, of every face."""

    def make(grad: bool) -> tuple[Any, ...]:
        size = (shape.images, shape.tokens, shape.width)
        tensors = [randn(*size, dtype=dtype, grad=grad) for _ in range(streams)]
        parameters = [randn(shape.width, dtype=dtype, grad=grad) for _ in range(2)]
        return (*tensors, *parameters, 1e-5)

    forward = count(shape.rows, shape.width, dtype.itemsize)
    backward = count(shape.rows, shape.width, dtype.itemsize, backward=True)
    for impl, face in faces.items():
        case = partial(Case, op=op, impl=impl, dtype=dtype, shape=shape)
        yield case(cost=forward, make=partial(make, False), run=face, short=streams == 2)
        yield case(
            cost=forward + backward,
            make=partial(make, True),
            run=face,
            direction="forward+backward",
        )


CASES = spread(layer_norm, add_layer_norm)


def test_norm(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["p50_ms"] > 0
