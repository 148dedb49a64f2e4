"""Launches of the trunk's kernels at ViT-L/14 shapes, for compilation only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kineticlip_kernels.mlp_triton import bias_quick_gelu_triton, linear_quick_gelu_triton
from kineticlip_kernels.norm_triton import add_layer_norm_triton, layer_norm_triton

BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def both_ways(outputs: Any, *inputs: Tensor) -> None:
    """Compiles the forward, which made the outputs, and the backward."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.empty_like(output) for output in outputs])


def norm() -> None:
    x, weight, bias = meta(2, 577, 1024), meta(1024), meta(1024)
    both_ways(layer_norm_triton(x, weight, bias), x, weight, bias)


def add_norm(width: int, dtype: torch.dtype = BF16) -> None:
    x, update = meta(2, 577, width, dtype=dtype), meta(2, 577, width, dtype=dtype)
    weight, bias = meta(width, dtype=dtype), meta(width, dtype=dtype)
    both_ways(add_layer_norm_triton(x, update, weight, bias), x, update, weight, bias)


def bias(dtype: torch.dtype = BF16) -> None:
    x, b = meta(2, 577, 4096, dtype=dtype), meta(4096, dtype=dtype)
    both_ways(bias_quick_gelu_triton(x, b), x, b)


def linear() -> None:
    x, weight, b = meta(2, 577, 1024), meta(4096, 1024), meta(4096)
    with torch.no_grad():
        linear_quick_gelu_triton(x, weight, b)
    both_ways(linear_quick_gelu_triton(x, weight, b), x, weight, b)


CASES = {
    "layer_norm 1024": norm,
    "add_layer_norm 1024": lambda: add_norm(1024),
    "add_layer_norm 1024 fp32": lambda: add_norm(1024, FP32),
    "add_layer_norm 4096 fp32": lambda: add_norm(4096, FP32),
    "add_layer_norm 8192 fp32": lambda: add_norm(8192, FP32),
    "bias_quick_gelu": bias,
    "bias_quick_gelu fp32": lambda: bias(FP32),
    "linear_quick_gelu": linear,
}

KINDS = {
    "norm_triton._forward": "memory",
    "norm_triton._backward": "memory",
    "mlp_triton._activate": "memory",
    "mlp_triton._activate_backward": "memory",
    "mlp_triton._linear": "matrix",
}
