"""LayerNorm, alone and with the residual addition: the Triton face against the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from kernel_rig import BF16, DTYPES, FP32, check, on_gpu, randn, strided

from kineticlip_kernels.dispatch import Impl, UnsupportedInput
from kineticlip_kernels.norm import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)

# 7 rows: no multiple of a program's 4 (forward) or 2 (backward). 50: under a block; 64: exactly
# one; 1: a row without variance. 577 and 257: tokens of ViT-L/14 at 336 and 224 pixels.
SHAPES = [(7, 50), (1, 64), (2, 3, 33), (5, 1), (0, 24), (577, 20), (257, 33)]
SHAPES += on_gpu((2, 577, 1024), (1001, 768))


def parameters(width: int, dtype: torch.dtype, grad: bool = True) -> dict[str, torch.Tensor]:
    weight = randn(width, dtype=dtype, seed=2, mean=1.0, scale=0.3, grad=grad)
    return {"weight": weight, "bias": randn(width, dtype=dtype, seed=3, grad=grad)}


def pair(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = parameters(width, FP32).values()
    return weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype)
    face = partial(layer_norm, impl="triton")
    check(layer_norm_reference, face, x=x, **parameters(shape[-1], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pair = {"residual": randn(*shape, dtype=dtype), "update": randn(*shape, dtype=dtype, seed=1)}
    face = partial(add_layer_norm, impl="triton")
    check(add_layer_norm_reference, face, **pair, **parameters(shape[-1], dtype))


@pytest.mark.parametrize("frozen", [True, False])
def test_wide_parameters_under_narrow_activations(frozen: bool) -> None:
    x, fp32 = randn(6, 40, dtype=BF16), parameters(40, FP32, grad=not frozen)
    check(layer_norm_reference, partial(layer_norm, impl="triton"), x=x, **fp32)


def test_large_mean_keeps_its_variance() -> None:
    x = randn(4, 48, mean=1000.0)
    check(layer_norm_reference, partial(layer_norm, impl="triton"), x=x, **parameters(48, FP32))


def test_rows_and_columns_with_gaps() -> None:
    face, rest = partial(layer_norm, impl="triton"), parameters(24, FP32)
    check(layer_norm_reference, face, x=strided(randn(5, 24)), **rest)
    class_token = randn(5, 3, 24).detach()[:, 0].requires_grad_()  # what ln_post sees
    assert not class_token.is_contiguous()
    check(layer_norm_reference, face, x=class_token, **rest)


def test_references_pass_gradcheck() -> None:
    x, update = randn(3, 5, dtype=torch.float64), randn(3, 5, dtype=torch.float64, seed=1)
    inputs = [x, *parameters(5, torch.float64).values()]
    assert torch.autograd.gradcheck(layer_norm_reference, inputs)
    assert torch.autograd.gradcheck(add_layer_norm_reference, [x, update, *inputs[1:]])


def test_a_second_derivative_is_an_error() -> None:
    x = randn(2, 8)
    y = layer_norm(x, *pair(8), impl="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradient_of_the_stream_alone() -> None:
    inputs = [randn(3, 8, seed=seed) for seed in (0, 1)]
    total, _ = add_layer_norm(inputs[0], inputs[1], *pair(8), impl="triton")
    grads = torch.autograd.grad(total.sum(), inputs)
    assert all(torch.equal(grad, torch.ones(3, 8).to(grad)) for grad in grads)


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
@pytest.mark.parametrize("width", [1, 8, 48])
def test_parameters_of_another_width_are_refused(width: int, impl: Any) -> None:
    """Shorter ones would be read past their end, longer ones in part."""
    x, right, wrong = randn(4, 24), parameters(24, FP32), parameters(width, FP32)
    for weight, bias in [wrong.values(), (right["weight"], wrong["bias"])]:
        with pytest.raises(UnsupportedInput, match=r"^layer_norm: x is \(4, 24\), weight \("):
            layer_norm(x, weight, bias, impl=impl)
        with pytest.raises(
            UnsupportedInput, match=r"^add_layer_norm: residual is \(4, 24\), weight \("
        ):
            add_layer_norm(x, x, weight, bias, impl=impl)
    with pytest.raises(UnsupportedInput, match=r"residual is \(4, 24\) and update \(1, 24\)"):
        add_layer_norm(x, x[:1], right["weight"], right["bias"], impl=impl)


def test_the_stream_wants_a_gradient_only_of_its_own() -> None:
    frozen = [randn(3, 8, seed=seed, grad=False) for seed in (0, 1)]
    weight, bias = pair(8)
    impls: tuple[Impl, ...] = ("reference", "triton")
    for impl in impls:
        total, y = add_layer_norm(frozen[0], frozen[1], weight, bias, impl=impl)
        assert (total.requires_grad, y.requires_grad) == (False, True)
        stream = [x.clone().requires_grad_() for x in frozen]
        total, _ = add_layer_norm(stream[0], stream[1], weight, bias, impl=impl)
        grads = torch.autograd.grad(total.sum(), [*stream, weight, bias], allow_unused=True)
        assert [grad is None for grad in grads] == [False, False, True, True]


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_rows_without_columns(impl: Any) -> None:
    x, nothing = randn(3, 0), randn(0)
    assert layer_norm(x, nothing, nothing, impl=impl).shape == (3, 0)


def test_more_bits_than_the_parameters() -> None:
    x = randn(4, 8, dtype=torch.float64)
    weight, bias = pair(8)
    y = layer_norm(x, weight, bias)
    expected = layer_norm(x, weight.double(), bias.double())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
