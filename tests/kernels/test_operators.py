"""The kernels as torch.compile sees them: custom operators with fake tensors and autograd."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from kernel_rig import DEVICE, MATRIX
from kernel_rig import randn as any_randn
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import KernelInterface

import kineticlip_kernels
from kineticlip_kernels import launch
from kineticlip_kernels.attention import (
    attention,
    class_attention,
    class_triton,
    forward_triton,
)
from kineticlip_kernels.examples import examples
from kineticlip_kernels.fp8 import linear_triton as fp8_linear
from kineticlip_kernels.fp8 import operands_triton
from kineticlip_kernels.mlp import bias_quick_gelu, gelu_triton, linear_quick_gelu, linear_triton
from kineticlip_kernels.norm import add_layer_norm, layer_norm, norm_triton

randn = partial(any_randn, dtype=MATRIX)
WEIGHT, BIAS = randn(24, seed=2), randn(24, seed=3)


def operands(*shapes: Sequence[int]) -> list[Tensor]:
    return [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]


OPERATORS: dict[str, tuple[Any, list[Any]]] = {
    "layer_norm": (norm_triton._layer_norm, [*operands((3, 24)), WEIGHT, BIAS, 1e-5]),
    "add_layer_norm": (
        norm_triton._add_layer_norm,
        [*operands((3, 24), (3, 24)), WEIGHT, BIAS, 1e-5],
    ),
    "bias_quick_gelu": (gelu_triton._bias_quick_gelu, [*operands((3, 24)), BIAS]),
    "linear_quick_gelu": (
        linear_triton._linear_quick_gelu,
        [*operands((3, 16), (24, 16)), BIAS, True],
    ),
    "attention": (
        forward_triton._attention,
        [*operands((2, 3, 3, 1, 8), (1, 2, 1, 8), (1, 2, 1, 8)), *[None] * 6],
    ),
    "class_mix": (
        class_triton._class_mix,
        [*operands((2, 2, 8), (2, 3, 8), (1, 2, 8)), *[None] * 3],
    ),
}

EXAMPLES = examples(torch.device(DEVICE), MATRIX)
EIGHT = randn(3, 16, grad=False).to(torch.float8_e4m3fn)
ONES = torch.ones(3, device=DEVICE)
PARAMETERS = [WEIGHT.detach(), BIAS.detach()]
ROW, QKV, KEY = (randn(*shape, grad=False) for shape in ((3, 24), (2, 3, 3, 1, 8), (1, 2, 1, 8)))
INFERENCE: dict[str, tuple[Any, list[Any]]] = {
    "quantize_rows": (operands_triton._quantize_rows, [ROW]),
    "layer_norm_fp8": (operands_triton._layer_norm, [ROW, *PARAMETERS, 1e-5]),
    "add_layer_norm_fp8": (operands_triton._add_layer_norm, [ROW, ROW, *PARAMETERS, 1e-5]),
    "bias_quick_gelu_fp8": (operands_triton._bias_quick_gelu, [ROW, PARAMETERS[1]]),
    "attention_fp8": (operands_triton._attention, [QKV, [KEY], [KEY], ONES[:2]]),
    "linear_fp8": (
        fp8_linear._linear_op,
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


FUSED = [
    value
    for module in pkgutil.walk_packages(kineticlip_kernels.__path__, "kineticlip_kernels.")
    if module.name.endswith("_triton")
    for value in vars(importlib.import_module(module.name)).values()
    if isinstance(value, launch.FusedOp)
]


def every_term() -> tuple[Callable[..., Any], dict[str, Any]]:
    example = EXAMPLES["attend_tokens"]
    tokens = example.inputs["tokens"]
    clips, frames, count, width = tokens.shape
    terms = {"conv_weight": randn(width, 1, 3), "conv_bias": randn(width)}
    terms |= {"position": randn(frames, width), "motion": randn(clips, frames, count - 1, width)}
    return example.op, {**example.inputs, **terms}


DIFFERENTIABLE = {
    name: (example.op, example.inputs)
    for name, example in EXAMPLES.items()
    if name not in ("cut_crops", "unfold_patches", "top_classes", "mean_softmax")
    and name not in INFERENCE
} | {"attend_tokens, every term": every_term()}


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched and do nothing: what they fill stays NaN."""

    def instead_of_a_kernel(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: None

    monkeypatch.setattr(KernelInterface, "__getitem__", instead_of_a_kernel)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_lie_as_inductor_is_promised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asserts the strides of the fake results on the real ones; aot_eager does not."""
    seen = []

    def compared(operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            found = operator(*arguments)
            with FakeTensorMode() as mode:
                promised = operator(*tree_map_only(Tensor, mode.from_tensor, arguments))
            for real, fake in zip(found, promised, strict=True):
                assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
                assert real.numel() == 0 or real.stride() == fake.stride()
            seen.append(operator)
            return found

        return run

    for fused in FUSED:
        monkeypatch.setattr(fused, "operator", compared(fused.operator))
        monkeypatch.setattr(fused, "backward_operator", compared(fused.backward_operator))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    op, inputs = DIFFERENTIABLE[name]
    leaves = tree_map_only(Tensor, as_leaf, dict(inputs))
    outputs = tree_leaves(op(**leaves, impl="triton"))
    sum(out.float().sum() for out in outputs).backward()
    assert len(seen) == 2


def as_leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_() if x.is_floating_point() else x


def larger(value: Any, axis: int, rows: int) -> Any:
    """The same with that many rows along an axis, the first repeated."""
    return value.narrow(axis, 0, 1).repeat_interleave(rows, dim=axis)


# Which inputs grow with the batch, and along which axis.
BATCHED = {
    "layer_norm": ["x"],
    "add_layer_norm": ["residual", "update"],
    "bias_quick_gelu": ["x"],
    "linear_quick_gelu": ["x"],
    "attention": ["qkv"],
    "class_attention": ["x"],
    "frame_attention": ["qkv"],
    "mean_normalize": ["x"],
    "mean_softmax": ["logits"],
    "class_cross_entropy": ["x", "labels"],
    "top_classes": ["x"],
    "neighbour_maps": ["q", "k"],
    "displacement": ["maps"],
    "attend_tokens": ["query", "tokens"],
    "unfold_patches": ["pixels"],
    "cut_crops": ["frames"],
    "quantize_rows": ["x"],
}


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", BATCHED)
def test_one_graph_serves_every_batch(name: str) -> None:
    """Two: torch.compile makes one for the first size, and one for all others."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    op = torch.compile(EXAMPLES[name].op, fullgraph=True, backend=count)
    inputs = EXAMPLES[name].inputs
    axis = 1 if name == "displacement" else 0
    for rows in (5, 6, 7, 9):
        grown = {key: larger(inputs[key], axis, rows) for key in BATCHED[name]}
        op(**{**inputs, **grown}, impl="triton")
    assert len(graphs) <= 2
