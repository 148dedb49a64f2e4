"""Launches of the trunk's kernels at ViT-L/14 shapes, for compilation only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kineticlip_kernels.norm_triton import add_layer_norm_triton, layer_norm_triton

BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def both_ways(outputs: Any, *inputs: Tensor) -> None:
    """Compiles the forward, which made the outputs, and the backward."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.empty_like(output) for output in outputs])


def norm(width: int, dtype: torch.dtype = BF16) -> None:
    x, update = meta(2, 577, width, dtype=dtype), meta(2, 577, width, dtype=dtype)
    weight, bias = meta(width, dtype=dtype), meta(width, dtype=dtype)
    both_ways(layer_norm_triton(x, weight, bias), x, weight, bias)
    both_ways(add_layer_norm_triton(x, update, weight, bias), x, update, weight, bias)


CASES = {
    "layer_norm 1024": lambda: norm(1024),
    "layer_norm 4096": lambda: norm(4096),
    "layer_norm 8192": lambda: norm(8192),
    "layer_norm 1024 fp32": lambda: norm(1024, FP32),
}

KINDS = {"norm_triton._forward": "memory", "norm_triton._backward": "memory"}
