"""Attention, with and without sources of keys and values, and the class token's alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from kernel_bench import GPU, SHAPES, Case, Shape, installed, randn, rivals, spread
from kineticlip_kernels import attention as ops
from kineticlip_kernels import cost

BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
KERNELS = ["triton"] + ["xformers"] * installed("xformers")
SOURCES = ((1, 8), (4, 32))  # rows and tokens: prompts of all images, and of a quarter of them


def by_backend(qkv: Tensor, *flat: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return ops.attention_sdpa(qkv, sources=pairs(flat))


def by_flash_four(qkv: Tensor, *flat: Tensor) -> Tensor:
    """FlashAttention 4 in the place of PyTorch's own FlashAttention 2."""
    activate_flash_attention_impl("FA4")
    try:
        return by_backend(qkv, *flat, backend=SDPBackend.FLASH_ATTENTION)
    finally:
        restore_flash_attention_impl()


def by_face(qkv: Tensor, *flat: Tensor, impl: Any) -> Tensor:
    return ops.attention(qkv, sources=pairs(flat), impl=impl)


def chunked(qkv: Tensor, *flat: Tensor) -> Tensor:
    return ops.attention_chunked(qkv, sources=pairs(flat))


def pairs(flat: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def attention(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    faces: dict[str, Callable[..., Any]] = {"sdpa": partial(by_face, impl="sdpa")}
    if GPU:
        faces |= {name: partial(by_backend, backend=b) for name, b in BACKENDS.items()}
        faces |= {name: partial(by_face, impl=name) for name in KERNELS}
        faces |= {"sdpa flash 4": by_flash_four} if installed("flash-attention 4") else {}
    else:
        faces |= {"reference": partial(by_face, impl="reference"), "chunked": chunked}
    for sources in ((), SOURCES):
        rows = tuple((min(m, shape.images), n) for m, n in sources)
        yield from both(faces, rows, shape, dtype)


def both(
    faces: dict[str, Callable[..., Any]],
    sources: tuple[tuple[int, int], ...],
    shape: Shape,
    dtype: torch.dtype,
) -> Iterator[Case]:
    heads, width = shape.heads, shape.head_width

    def make(grad: bool) -> tuple[Tensor, ...]:
        qkv = randn(shape.images, shape.tokens, 3, heads, width, dtype=dtype, grad=grad)
        sizes = [(m, n, heads, width) for m, n in sources for _ in "kv"]
        return qkv, *(randn(*size, dtype=dtype, grad=grad) for size in sizes)

    size = (shape.images, shape.tokens, heads, width, dtype.itemsize)
    forward = cost.attention(*size, sources=sources)
    backward = cost.attention(*size, sources=sources, backward=True)
    for impl, face in faces.items():
        op = "attention with sources" if sources else "attention"
        case = partial(Case, op=op, impl=impl, dtype=dtype, shape=shape)
        short = shape in SHAPES[:2] and dtype == torch.bfloat16
        yield case(cost=forward, make=partial(make, False), run=face, short=short)
        if impl != "chunked":
            yield case(
                cost=forward + backward,
                make=partial(make, True),
                run=face,
                direction="forward+backward",
            )


def class_attention(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    heads = shape.heads

    def projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """All tokens projected and attended, as without the absorbed form."""
        qkv = F.linear(x, weight, bias).unflatten(2, (3, heads, -1))
        return ops.attention(qkv, impl="sdpa")[:, 0]

    absorbed = partial(ops.class_attention_reference, heads=heads)
    faces = rivals(absorbed, triton=partial(ops.class_attention, heads=heads, impl="triton"))
    if shape.width > ops.MAX_CLASS_WIDTH:
        faces.pop("triton", None)

    def make(grad: bool) -> tuple[Tensor, ...]:
        width = shape.width
        x = randn(shape.images, shape.tokens, width, dtype=dtype, grad=grad)
        weight = randn(3 * width, width, dtype=dtype, scale=width**-0.5, grad=grad)
        return x, weight, randn(3 * width, dtype=dtype, grad=grad)

    size = (shape.images, shape.tokens, heads, shape.width, dtype.itemsize)
    forward, backward = cost.class_attention(*size), cost.class_attention(*size, backward=True)
    for impl, face in {**faces, "projected": projected}.items():
        case = partial(Case, op="class_attention", impl=impl, dtype=dtype, shape=shape)
        yield case(cost=forward, make=partial(make, False), run=face)
        yield case(
            cost=forward + backward,
            make=partial(make, True),
            run=face,
            direction="forward+backward",
        )


CASES = spread(attention, class_attention)


def test_attention(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["p50_ms"] > 0
