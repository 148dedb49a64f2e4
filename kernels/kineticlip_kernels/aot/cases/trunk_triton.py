"""Launches of the trunk's kernels at ViT-L/14 shapes, for compilation only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kineticlip_kernels.attention import MAX_CLASS_HEADS, MAX_CLASS_WIDTH, MAX_HEAD_WIDTH
from kineticlip_kernels.attention.class_triton import class_attention_triton
from kineticlip_kernels.attention.forward_triton import attention_triton
from kineticlip_kernels.fp8 import FP8, MAX_ROW, Scaled
from kineticlip_kernels.fp8.linear_triton import linear_fp8_triton
from kineticlip_kernels.fp8.operands_triton import (
    add_layer_norm_fp8_triton,
    attention_fp8_triton,
    bias_quick_gelu_fp8_triton,
    layer_norm_fp8_triton,
    quantize_rows_triton,
)
from kineticlip_kernels.mlp.gelu_triton import bias_quick_gelu_triton
from kineticlip_kernels.mlp.linear_triton import linear_quick_gelu_triton
from kineticlip_kernels.norm import MAX_WIDTH
from kineticlip_kernels.norm.norm_triton import add_layer_norm_triton, layer_norm_triton

BF16, FP32 = torch.bfloat16, torch.float32
FOUR = ((1, 8), (2, 8), (4, 24), (8, 3))  # sources: MAX_SOURCES of them


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def both_ways(outputs: Any, *inputs: Tensor) -> None:
    """Compiles the forward, which made the outputs, and the backward."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, inputs, [torch.empty_like(output) for output in outputs])


def norm() -> None:
    with torch.no_grad():
        layer_norm_triton(meta(2, 577, 1024), meta(1024), meta(1024))


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


def attend(width: int, *sources: tuple[int, int]) -> None:
    qkv = meta(8, 577, 3, 1024 // width, width)
    pairs = [
        (meta(m, n, 1024 // width, width), meta(m, n, 1024 // width, width)) for m, n in sources
    ]
    flat = [tensor for pair in pairs for tensor in pair]
    both_ways(attention_triton(qkv, sources=pairs), qkv, *flat)


def attend_class(*sources: tuple[int, int]) -> None:
    width = MAX_CLASS_WIDTH
    x, weight, b = meta(8, 577, width), meta(3 * width, width), meta(3 * width)
    tokens = [meta(m, n, width) for m, n in sources]
    out = class_attention_triton(x, weight, b, heads=MAX_CLASS_HEADS, sources=tokens)
    both_ways(out, x, weight, b, *tokens)


@torch.no_grad()
def eight_bits() -> None:
    x, parameters, out = meta(2, 577, 1024), (meta(1024), meta(1024)), meta(2, 577, 4096)
    quantize_rows_triton(x)
    add_layer_norm_fp8_triton(x, x, *parameters, 1e-5)
    bias_quick_gelu_fp8_triton(out, meta(4096))
    attention_fp8_triton(meta(2, 577, 3, 16, 64))
    eight = Scaled(x.to(FP8), meta(2, 577, dtype=FP32))
    weight = Scaled(meta(4096, 1024).to(FP8), meta(4096, dtype=FP32))
    linear_fp8_triton(eight, weight, meta(4096), dtype=BF16)
    layer_norm_fp8_triton(meta(2, MAX_WIDTH), meta(MAX_WIDTH), meta(MAX_WIDTH), 1e-5)
    bias_quick_gelu_fp8_triton(meta(2, MAX_ROW), meta(MAX_ROW))


CASES = {
    "layer_norm 1024": norm,
    "add_layer_norm 1024": lambda: add_norm(1024),
    "add_layer_norm 1024 fp32": lambda: add_norm(1024, FP32),
    "add_layer_norm, widest": lambda: add_norm(MAX_WIDTH),
    "add_layer_norm, widest fp32": lambda: add_norm(MAX_WIDTH, FP32),
    "bias_quick_gelu": bias,
    "bias_quick_gelu fp32": lambda: bias(FP32),
    "linear_quick_gelu": linear,
    "attention 64, four sources": lambda: attend(64, *FOUR),
    "class_attention, two sources": lambda: attend_class(*FOUR[1:3]),
    "attention, widest heads, four sources": lambda: attend(MAX_HEAD_WIDTH, *FOUR),
    "fp8": eight_bits,
}

MIN_ARCH = {"fp8": 89}

KINDS = {
    "fp8.operands_triton._rows": "memory",
    "fp8.linear_triton._linear": "matrix",
    "norm.forward_triton._forward": "memory",
    "norm.backward_triton._backward": "memory",
    "mlp.gelu_triton._activate": "memory",
    "mlp.gelu_triton._activate_backward": "memory",
    "mlp.linear_triton._linear": "matrix",
    # No "matrix", which demands HGMMA: one query an image takes 4 H products a token element of 2
    # bytes, 32 FLOP a byte at 16 heads, and an H200 multiplies 200 in the time of one byte. The
    # scores of 32 tokens are under the 64 rows of an HGMMA, and run on HMMA.
    "attention.class_triton._forward": "memory",
    "attention.class_triton._backward": "memory",
    "attention.forward_triton._forward": "matrix",
    "attention.backward_triton._delta": "memory",
    "attention.backward_keys_triton._backward_keys": "matrix",
    "attention.backward_queries_triton._backward_queries": "matrix",
}
