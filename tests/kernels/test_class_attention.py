"""The class token's attention with absorbed projections: exact, and the Triton face equal to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_rig import BF16, DEVICE, FP32, MATRIX, MATRIX_DTYPES, check, on_gpu, randn
from torch import Tensor

from kineticlip_kernels.attention import (
    attention_reference,
    class_attention,
    class_attention_reasons,
    class_attention_reference,
)
from kineticlip_kernels.dispatch import UnsupportedInput

THREE = ((1, 3), (2, 18), (4, 5))


def operands(
    images: int,
    tokens: int,
    heads: int,
    width: int,
    sources: Sequence[tuple[int, int]] = (),
    dtype: torch.dtype = FP32,
) -> dict[str, Any]:
    tokens_of = [
        randn(rows, n, width, dtype=dtype, seed=3 + i) for i, (rows, n) in enumerate(sources)
    ]
    return {
        "x": randn(images, tokens, width, dtype=dtype),
        "weight": randn(3 * width, width, dtype=dtype, seed=1, scale=width**-0.5),
        "bias": randn(3 * width, dtype=dtype, seed=2),
        "heads": heads,
        "sources": tokens_of,
    }


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize(
    ("images", "tokens", "heads", "width", "sources"),
    [
        (2, 17, 2, 16, ()),
        (1, 1, 3, 24, ()),
        (4, 33, 2, 32, THREE),
        (1, 577, 1, 8, ()),
        (0, 5, 1, 8, ()),
        (0, 5, 1, 8, ((1, 2),)),
        *on_gpu((4, 577, 16, 1024, ((1, 8), (2, 24))), (3, 197, 12, 768, ())),
    ],
)
def test_triton(
    images: int,
    tokens: int,
    heads: int,
    width: int,
    sources: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> None:
    inputs = operands(images, tokens, heads, width, sources, dtype)
    face = partial(class_attention, impl="triton")
    check(class_attention_reference, face, **inputs)


def test_frozen_sources_and_projection() -> None:
    inputs = operands(4, 9, 2, 16, ((2, 3),), BF16)
    for tensor in (inputs["weight"], inputs["bias"], inputs["sources"][0]):
        tensor.requires_grad_(False)
    check(class_attention_reference, partial(class_attention, impl="triton"), **inputs)


def projected(x: Tensor, weight: Tensor, bias: Tensor, heads: int, *sources: Tensor) -> Tensor:
    """Row 0 of the attention with keys and values projected, as CLIP computes it."""
    sets = [F.linear(y, weight, bias).unflatten(2, (3, heads, -1)) for y in (x, *sources)]
    pairs = [(kv[:, :, 1], kv[:, :, 2]) for kv in sets[1:]]
    return attention_reference(sets[0], sources=pairs)[:, 0]


def test_absorbed_projections_change_nothing() -> None:
    """Outputs and every gradient, in float64, against the projected form."""
    inputs = operands(4, 7, 2, 8, THREE, torch.float64)
    sources = inputs.pop("sources")
    absorbed = class_attention_reference(**inputs, sources=sources)
    full = projected(*inputs.values(), *sources)
    torch.testing.assert_close(absorbed, full, rtol=1e-12, atol=1e-12)
    leaves = [inputs["x"], inputs["weight"], *sources]
    grad = torch.randn_like(full)
    for one, other in zip(
        torch.autograd.grad(absorbed, leaves, grad),
        torch.autograd.grad(full, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_reference_passes_gradcheck() -> None:
    inputs = operands(2, 3, 2, 4, ((1, 2),), torch.float64)

    def function(x: Tensor, weight: Tensor, bias: Tensor, source: Tensor) -> Tensor:
        return class_attention_reference(x, weight, bias, heads=2, sources=[source])

    leaves = (inputs["x"], inputs["weight"], inputs["bias"], *inputs["sources"])
    assert torch.autograd.gradcheck(function, leaves)


def test_key_bias_has_no_gradient() -> None:
    """It adds the same to every score of a head."""
    inputs = operands(2, 5, 2, 8)
    (grad,) = torch.autograd.grad(class_attention(**inputs).square().sum(), [inputs["bias"]])
    assert torch.equal(grad[8:16], torch.zeros_like(grad[8:16]))
    assert grad[:8].abs().min() > 0


def test_sources_must_fit() -> None:
    inputs = operands(3, 5, 2, 8) | {"sources": [torch.zeros(2, 4, 8)]}
    with pytest.raises(UnsupportedInput, match="source 0 is"):
        class_attention(**inputs)


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (24, 16), r"expected \[M, N >= 1, D\], \[3 D, D\]"),
        ("weight", (16, 8), r"expected \[M, N >= 1, D\], \[3 D, D\]"),
        ("bias", (16,), r"bias \(16,\); expected"),
        ("x", (2, 8), r"x is \(2, 8\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    name: str, shape: tuple[int, ...], message: str, impl: Any
) -> None:
    inputs = operands(2, 5, 2, 8) | {name: randn(*shape)}
    with pytest.raises(UnsupportedInput, match=message):
        class_attention(**inputs, impl=impl)


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(UnsupportedInput, match="3 heads do not divide D 8"):
        class_attention(**(operands(2, 5, 2, 8) | {"heads": 3}))


def test_more_heads_than_the_backward_has_shared_memory_for() -> None:
    inputs = operands(1, 3, 32, 64, (), MATRIX)
    with pytest.raises(UnsupportedInput, match=r"cannot run: 32 heads \(at most 16\)"):
        class_attention(**inputs, impl="triton")
    x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
    assert "32 heads (at most 16)" in class_attention_reasons("auto", x, weight, bias, (), heads=32)


def test_autocast_to_another_dtype_than_the_tokens() -> None:
    """The projection of the query comes out in autocast's dtype, the tokens stay in theirs."""
    inputs = operands(2, 9, 2, 16, ((1, 3),), MATRIX)
    exact = class_attention_reference(**inputs)
    with torch.autocast(DEVICE, BF16):
        plain = class_attention(**inputs, impl="reference")
        found = class_attention(**inputs, impl="triton")
    assert found.dtype == plain.dtype
    torch.testing.assert_close(found, exact.to(found.dtype), rtol=3e-2, atol=3e-2)
    grads = torch.autograd.grad(found.float().sum(), [inputs["x"], *inputs["sources"]])
    assert all(grad.dtype == MATRIX and grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
def test_tokens_behind_the_end_stay_out_of_gradients(dtype: torch.dtype) -> None:
    """Absorbed scores lack q . b_k, and may lie far below zero, where a tile's padding is."""
    inputs = operands(2, 5, 1, 16, dtype=FP32)
    x, weight = inputs["x"].detach() * 0.1, inputs["weight"].detach() * 0.1
    x[:, :, 0] = 10.0
    weight[0, 0], weight[16, 0] = 1.0, -1.2  # q = 10, k = -12: scores of -30
    leaves = {"x": x, "weight": weight, "bias": inputs["bias"].detach() * 0.1}
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in leaves.items()}
    check(
        partial(class_attention_reference, heads=1),
        partial(class_attention, heads=1, impl="triton"),
        **leaves,
    )
