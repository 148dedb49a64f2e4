"""The kernels as torch.compile sees them: custom operators with fake tensors and autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernel_rig import FP32, randn
from torch import Tensor

from kineticlip_kernels import mlp_triton, norm_triton
from kineticlip_kernels.mlp import bias_quick_gelu, linear_quick_gelu
from kineticlip_kernels.norm import add_layer_norm, layer_norm

WEIGHT, BIAS = randn(24, seed=2), randn(24, seed=3)


def operands(*shapes: Sequence[int]) -> list[Tensor]:
    return [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]


OPERATORS = {
    "layer_norm": (norm_triton._layer_norm, [*operands((3, 24)), WEIGHT, BIAS, 1e-5]),
    "add_layer_norm": (
        norm_triton._add_layer_norm,
        [*operands((3, 24), (3, 24)), WEIGHT, BIAS, 1e-5],
    ),
    "bias_quick_gelu": (mlp_triton._bias_quick_gelu, [*operands((3, 24)), BIAS]),
    "linear_quick_gelu": (
        mlp_triton._linear_quick_gelu,
        [*operands((3, 16), (24, 16)), BIAS, True],
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_registered_as_it_behaves(name: str) -> None:
    op, inputs = OPERATORS[name]
    results = torch.library.opcheck(op.operator, tuple(inputs))
    assert set(results.values()) == {"SUCCESS"}


def block(x: Tensor, weight: Tensor, bias: Tensor, linear: Tensor, impl: Any) -> Tensor:
    """A little of a ViT block, every op once."""
    y = layer_norm(x, weight, bias, impl=impl)
    total, y = add_layer_norm(x, y, weight, bias, impl=impl)
    return (
        total + linear_quick_gelu(y, linear, bias, impl=impl) + bias_quick_gelu(y, bias, impl=impl)
    )


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_whole_graph_compiles_to_the_same_numbers(impl: str) -> None:
    inputs = [randn(5, 24), WEIGHT, BIAS, randn(24, 24, seed=4, scale=0.2)]
    assert_same(lambda *values: block(*values, impl), inputs)


def assert_same(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager_out, compiled_out = function(*inputs), compiled(*inputs)
    assert torch.equal(eager_out, compiled_out)
    grad = torch.ones_like(eager_out)
    eager_grads = torch.autograd.grad(eager_out, inputs, grad)
    compiled_grads = torch.autograd.grad(compiled_out, inputs, grad)
    for eager, other in zip(eager_grads, compiled_grads, strict=True):
        assert eager.dtype == FP32
        torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-6)
