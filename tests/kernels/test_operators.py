"""The kernels as torch.compile sees them: custom operators with fake tensors and autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from kernel_rig import DEVICE, MATRIX
from kernel_rig import randn as any_randn
from torch import Tensor
from triton.runtime.jit import KernelInterface

from kineticlip_kernels import (
    attention_triton,
    class_attention_triton,
    fp8_triton,
    launch,
    mlp_triton,
    norm_triton,
)
from kineticlip_kernels.attention import attention, class_attention
from kineticlip_kernels.examples import examples
from kineticlip_kernels.mlp import bias_quick_gelu, linear_quick_gelu
from kineticlip_kernels.norm import add_layer_norm, layer_norm

randn = partial(any_randn, dtype=MATRIX)
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
    "attention": (
        attention_triton._attention,
        [*operands((2, 3, 3, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8)), *[None] * 6],
    ),
    "class_mix": (
        class_attention_triton._class_mix,
        [*operands((2, 2, 8), (2, 3, 8), (1, 2, 8)), *[None] * 3],
    ),
}

EXAMPLES = examples(torch.device(DEVICE), MATRIX)
EIGHT = randn(3, 16, grad=False).to(torch.float8_e4m3fn)
ONES = torch.ones(3, device=DEVICE)
PARAMETERS = [WEIGHT.detach(), BIAS.detach()]
ROW, QKV, KEY = (randn(*shape, grad=False) for shape in ((3, 24), (2, 3, 3, 1, 8), (1, 2, 1, 8)))
INFERENCE = {
    "quantize_rows": (fp8_triton.quantize_rows_triton, [ROW]),
    "layer_norm_fp8": (fp8_triton.layer_norm_fp8_triton, [ROW, *PARAMETERS, 1e-5]),
    "add_layer_norm_fp8": (fp8_triton.add_layer_norm_fp8_triton, [ROW, ROW, *PARAMETERS, 1e-5]),
    "bias_quick_gelu_fp8": (fp8_triton.bias_quick_gelu_fp8_triton, [ROW, PARAMETERS[1]]),
    "attention_fp8": (fp8_triton._attention, [QKV, [KEY], [KEY], ONES[:2]]),
    "linear_fp8": (
        fp8_triton.linear_fp8_triton,
        [EIGHT, ONES, EIGHT, ONES, None, torch.bfloat16],
    ),
}


@pytest.mark.parametrize("name", INFERENCE)
def test_operator_without_gradients(name: str) -> None:
    op, inputs = INFERENCE[name]
    # The schema test multiplies its inputs, which PyTorch cannot do in e4m3.
    utilities = ["test_faketensor"] + ["test_schema"] * (name != "linear_fp8")
    results = torch.library.opcheck(op.operator, tuple(inputs), test_utils=utilities)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_registered_as_it_behaves(name: str) -> None:
    op, inputs = OPERATORS[name]
    results = torch.library.opcheck(op.operator, tuple(inputs))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_kernels_are_launched_on_the_device_of_the_inputs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched, launched = [False], []

    def spy(inputs: Sequence[Any], function: Callable[..., Any]) -> Any:
        assert any(isinstance(value, Tensor) for value in inputs)
        switched[0] = True
        try:
            return function(*inputs)
        finally:
            switched[0] = False

    def instead_of_a_kernel(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: launched.append(switched[0])

    monkeypatch.setattr(launch, "on_device_of", spy)
    monkeypatch.setattr(KernelInterface, "__getitem__", instead_of_a_kernel)
    EXAMPLES[name].op(**EXAMPLES[name].inputs, impl="triton")
    assert launched and all(launched)


def block(x: Tensor, weight: Tensor, bias: Tensor, linear: Tensor) -> Tensor:
    """A little of a ViT block, every op once. Faces without kernels: test_compiled_gradients.py."""
    y = layer_norm(x, weight, bias, impl="triton")
    total, y = add_layer_norm(x, y, weight, bias, impl="triton")
    hidden = linear_quick_gelu(y, linear, bias, impl="triton")
    return total + hidden + bias_quick_gelu(y, bias, impl="triton")


def test_whole_graph_compiles_to_the_same_numbers() -> None:
    assert_same(block, [randn(5, 24), WEIGHT, BIAS, randn(24, 24, seed=4, scale=0.2)])


def test_attention_compiles_to_the_same_numbers() -> None:
    weight, bias = randn(24, 8, seed=5), randn(24, seed=6)

    def function(x: Tensor, extra: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        qkv = torch.nn.functional.linear(x, weight, bias).unflatten(2, (3, 2, 4))
        kv = torch.nn.functional.linear(extra, weight[8:], bias[8:]).unflatten(2, (2, 2, 4))
        out = attention(qkv, sources=[(kv[:, :, 0], kv[:, :, 1])], impl="triton")
        first = class_attention(x, weight, bias, heads=2, sources=[extra], impl="triton")
        return out + first.unsqueeze(1)

    assert_same(function, [*operands((2, 3, 8), (1, 2, 8)), weight, bias])


def assert_same(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager_out, compiled_out = function(*inputs), compiled(*inputs)
    assert torch.equal(eager_out, compiled_out)
    grad = torch.ones_like(eager_out)
    eager_grads = torch.autograd.grad(eager_out, inputs, grad)
    compiled_grads = torch.autograd.grad(compiled_out, inputs, grad)
    for eager, other in zip(eager_grads, compiled_grads, strict=True):
        # Sums of gradients may be rounded in another order.
        tolerance = 1e-5 if MATRIX == torch.float32 else 2e-2
        torch.testing.assert_close(other, eager, rtol=tolerance, atol=tolerance)
