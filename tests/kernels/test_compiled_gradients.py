"""Results and gradients under torch.compile are eager ones, for every plain PyTorch face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from kernel_rig import DEVICE, FP32, randn
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from kineticlip_kernels.examples import examples

EXAMPLES = examples(torch.device(DEVICE), FP32)
# What has no gradient: bytes, 8 bits, class numbers.
WITHOUT = {"cut_crops", "unfold_patches", "top_classes", "quantize_rows"}
WITHOUT |= {name for name in EXAMPLES if name.endswith("_fp8")}
# Beside "reference". The Triton faces are compiled by the tests of their files.
FACES = {
    "attention": ["sdpa"],
    "attention with sources": ["sdpa"],
    "frame_attention": ["sdpa"],
    "neighbour_maps": ["lean"],
    "displacement": ["lean"],
    "attend_tokens": ["lean"],
}
CASES = [
    (name, face)
    for name in EXAMPLES
    if name not in WITHOUT
    for face in ["reference", *FACES.get(name, [])]
]


def leaf(value: Any) -> Any:
    """The same, wanting a gradient where it is a tensor of floats."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value


def differentiated(
    function: Callable[..., Any], inputs: Mapping[str, Any], face: str
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """-> (the outputs, the gradients of the inputs that want one)."""
    outputs = tree_leaves(function(**inputs, impl=face))
    grads = [randn(*out.shape, seed=seed, grad=False) for seed, out in enumerate(outputs)]
    wanted = [v for v in tree_leaves(inputs) if isinstance(v, Tensor) and v.requires_grad]
    return outputs, torch.autograd.grad(outputs, wanted, grads)


def assert_compiled_gradients(op: Callable[..., Any], given: Mapping[str, Any], face: str) -> None:
    torch._dynamo.reset()  # one code object, many cases: past its limit of them it runs eagerly
    inputs = tree_map(leaf, dict(given))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected, found = (differentiated(function, inputs, face) for function in (op, compiled))
    assert all(grad.any() for grad in expected[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "face"), CASES)
def test_compiled_results_and_gradients(name: str, face: str) -> None:
    assert_compiled_gradients(EXAMPLES[name].op, EXAMPLES[name].inputs, face)


def test_compiled_gradients_of_every_term_of_attend_tokens() -> None:
    clips, frames, count, width = 1, 3, 5, 8
    terms = {
        "query": randn(clips, 2, width),
        "tokens": randn(clips, frames, count, width, seed=1),
        "conv_weight": randn(width, 1, 3, seed=2),
        "conv_bias": randn(width, seed=3),
        "position": randn(frames, width, seed=4),
        "motion": randn(clips, frames, count - 1, width, seed=5),
    }
    assert_compiled_gradients(EXAMPLES["attend_tokens"].op, terms, "lean")


@pytest.mark.parametrize("name", ["attention with sources", "class_attention"])
def test_softmax_is_not_split(name: str) -> None:
    """Inductor (PyTorch 2.11, CPU) makes wrong gradients of softmax(cat).split(sizes)."""
    code = []

    def read(graph: Any, inputs: Any) -> Any:
        code.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    inputs = dict(EXAMPLES[name].inputs)
    if name == "class_attention":
        inputs["sources"] = [inputs["x"]]
    torch.compile(EXAMPLES[name].op, fullgraph=True, backend=read)(**inputs, impl="reference")
    assert "softmax" in code[0] and "split" not in code[0]


def test_lean_maps_of_several_batches() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(EXAMPLES["neighbour_maps"].op, fullgraph=True, backend="aot_eager")
    for clips in (2, 3):
        q, k = (randn(clips, 2, 5, 2, 8, seed=seed) for seed in (0, 1))
        found = torch.autograd.grad(compiled(q, k, impl="lean").square().sum(), (q, k))
        plain = EXAMPLES["neighbour_maps"].op(q, k, impl="lean").square().sum()
        torch.testing.assert_close(found, torch.autograd.grad(plain, (q, k)))
