"""Averages of embeddings, cross-entropy over many classes, and the best of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernel_bench import DEVICE, DTYPES, GPU, Case, Shape, randn, rivals
from kineticlip_kernels import cost_methods, head

WIDTH, FRAMES = 768, 32
# clips of a batch, classes: Kinetics-400, and a vocabulary of 100,000 names
SIZES = ((8, 400), (256, 400), (64, 100_000), (256, 100_000)) if GPU else ((8, 400), (8, 10_000))


def classes_shape(rows: int, classes: int) -> Shape:
    return Shape(f"{rows} rows x {classes} classes", rows, classes, WIDTH, 1)


def mean_normalize(rows: int, dtype: torch.dtype) -> Iterator[Case]:
    shape = Shape(f"{rows} clips x {FRAMES} frames", rows, FRAMES, WIDTH, 1)
    faces = rivals(
        head.mean_normalize_reference, triton=partial(head.mean_normalize, impl="triton")
    )
    size = (rows, FRAMES, WIDTH, dtype.itemsize)
    forward = cost_methods.mean_normalize(*size)
    both = forward + cost_methods.mean_normalize(*size, backward=True)

    def make(grad: bool) -> tuple[Tensor]:
        return (randn(rows, FRAMES, WIDTH, dtype=dtype, grad=grad),)

    for impl, face in faces.items():
        case = partial(Case, op="mean_normalize", impl=impl, dtype=dtype, shape=shape)
        yield case(cost=forward, make=partial(make, False), run=face)
        yield case(cost=both, make=partial(make, True), run=face, direction="forward+backward")


def cross_entropy(rows: int, classes: int, dtype: torch.dtype) -> Iterator[Case]:
    shape = classes_shape(rows, classes)
    faces = rivals(
        head.class_cross_entropy_reference,
        triton=partial(head.class_cross_entropy, impl="triton"),
    )
    size = (rows, classes, WIDTH, dtype.itemsize)
    cost = cost_methods.class_cross_entropy(*size)
    cost += cost_methods.class_cross_entropy(*size, backward=True)

    def make() -> tuple[Tensor, ...]:
        x = randn(rows, WIDTH, dtype=dtype, scale=0.04, grad=True)
        names = randn(classes, WIDTH, dtype=dtype, scale=0.04, grad=True)
        labels = torch.randint(classes, (rows,), device=DEVICE)
        return x, names, labels, torch.tensor(100.0, device=DEVICE)

    for impl, face in faces.items():
        yield Case("class_cross_entropy", impl, dtype, shape, cost, make, face, "forward+backward")


def top_classes(rows: int, classes: int, dtype: torch.dtype) -> Iterator[Case]:
    shape = classes_shape(rows, classes)
    cost = cost_methods.top_classes(rows, classes, WIDTH, dtype.itemsize)
    faces = rivals(
        partial(head.top_classes_reference, k=5),
        triton=partial(head.top_classes, k=5, impl="triton"),
    )

    def make() -> tuple[Tensor, Tensor]:
        pair = (randn(n, WIDTH, dtype=dtype, scale=0.04) for n in (rows, classes))
        return next(pair), next(pair)

    for impl, face in faces.items():
        yield Case("top_classes", impl, dtype, shape, cost, make, face)


def mean_softmax(rows: int, classes: int, dtype: torch.dtype) -> Iterator[Case]:
    """12 views of each video."""
    shape = Shape(f"{rows} videos x 12 views x {classes} classes", rows, 12, classes, 1)
    cost = cost_methods.mean_softmax(rows, 12, classes, dtype.itemsize)
    faces = rivals(head.mean_softmax_reference, triton=partial(head.mean_softmax, impl="triton"))

    def make() -> tuple[Tensor]:
        return (randn(rows, 12, classes, dtype=dtype, scale=5.0),)

    for impl, face in faces.items():
        yield Case("mean_softmax", impl, dtype, shape, cost, make, face)


def cases() -> Iterator[Case]:
    for rows, dtype in itertools.product(sorted({rows for rows, _ in SIZES}), DTYPES):
        yield from mean_normalize(rows, dtype)
    for (rows, classes), dtype in itertools.product(SIZES, DTYPES):
        yield from cross_entropy(rows, classes, dtype)
        yield from top_classes(rows, classes, dtype)
        if classes <= head.MAX_CLASSES:
            yield from mean_softmax(rows, classes, dtype)


CASES = [case for case in cases() if case.impl != "torch.compile" or case.dtype == torch.bfloat16]


def test_head(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["p50_ms"] > 0
