"""8-bit operands: what writes them, and the products against bf16 at the shapes of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench import GPU, SHAPES, Case, Shape, randn, spread
from kineticlip_kernels import cost, fp8
from kineticlip_kernels.fp8 import FP8, Scaled

IMPLS: tuple[Any, ...] = ("reference", "triton") if GPU else ("reference",)
PRODUCTS = {"qkv": (1, 3), "out": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}


def producers(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    width, hidden = shape.width, 4 * shape.width
    stream = (shape.images, shape.tokens, width)
    parameters = partial(randn, dtype=dtype)

    def normed() -> tuple[Tensor, ...]:
        return (*(randn(*stream, dtype=dtype) for _ in "xu"), parameters(width), parameters(width))

    def activated() -> tuple[Tensor, ...]:
        return randn(*stream[:2], hidden, dtype=dtype), parameters(hidden)

    rows, size = shape.rows, dtype.itemsize
    ops: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]], cost.Cost]] = {
        "quantize_rows": (
            fp8.quantize_rows,
            lambda: (randn(*stream, dtype=dtype),),
            cost.quantize_rows(rows, width, size),
        ),
        "layer_norm_fp8": (
            fp8.layer_norm_fp8,
            lambda: (randn(*stream, dtype=dtype), parameters(width), parameters(width)),
            cost.quantize_rows(rows, width, size),
        ),
        "add_layer_norm_fp8": (
            fp8.add_layer_norm_fp8,
            normed,
            cost.quantize_rows(rows, width, size) + cost.Cost(0, 2 * rows * width * size),
        ),
        "bias_quick_gelu_fp8": (
            fp8.bias_quick_gelu_fp8,
            activated,
            cost.quantize_rows(rows, hidden, size),
        ),
        "attention_fp8": (
            fp8.attention_fp8,
            lambda: (randn(*stream[:2], 3, shape.heads, shape.head_width, dtype=dtype),),
            eight_bit_attention(shape, size),
        ),
    }
    for (name, (op, make, count)), impl in ((item, i) for item in ops.items() for i in IMPLS):
        run = partial(op, impl=impl)
        yield Case(op=name, impl=impl, dtype=dtype, shape=shape, cost=count, make=make, run=run)


def eight_bit_attention(shape: Shape, itemsize: int) -> cost.Cost:
    """The values are read once more, for the scale; one byte an element is written."""
    plain = cost.attention(shape.images, shape.tokens, shape.heads, shape.head_width, itemsize)
    return plain + cost.Cost(0, shape.rows * shape.width)


def tensorwise(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """One scale a tensor: what cuBLAS does fastest."""
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale[0],
        scale_b=weight_scale[0],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def by_rows(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *, impl: Any
) -> Tensor:
    return fp8.linear_fp8(Scaled(x, x_scale), Scaled(weight, weight_scale), impl=impl)


def in_bf16(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return F.linear(x, weight)


def products(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    if dtype != torch.bfloat16:
        return
    faces: dict[str, Callable[..., Tensor]] = {"bf16": in_bf16}
    if GPU:
        faces |= {"scaled_mm tensor": tensorwise}
        faces |= {f"{impl} rows": partial(by_rows, impl=impl) for impl in ("scaled_mm", "triton")}
    else:
        faces["reference rows"] = partial(by_rows, impl="reference")
    for name, (depth, width) in PRODUCTS.items():
        size = (shape.rows, depth * shape.width, width * shape.width)
        for impl, run in faces.items():
            operand = dtype if impl == "bf16" else FP8
            yield Case(
                op=f"linear_fp8 {name}",
                impl=impl,
                dtype=dtype,
                shape=shape,
                cost=cost.linear(*size, operand.itemsize, out_itemsize=2),
                make=partial(operands, *size, dtype=operand),
                run=run,
                matrix_dtype=operand if GPU else dtype,
                short=shape == SHAPES[0],
            )


def operands(rows: int, depth: int, width: int, *, dtype: torch.dtype) -> tuple[Tensor, ...]:
    def scaled(*size: int) -> tuple[Tensor, Tensor]:
        x = randn(*size, dtype=torch.bfloat16)
        if dtype != FP8:
            return x, randn(size[0], dtype=torch.float32)
        result = fp8.quantize_rows(x)
        return result.values, result.scale

    return *scaled(rows, depth), *scaled(width, depth)


CASES = spread(producers, products)


def test_fp8(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["p50_ms"] > 0
