"""Launches of EVL's kernels at ViT-B/16 and ViT-L/14-336 shapes, for compilation only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kineticlip_kernels.evl.displacement_triton import displacement_triton
from kineticlip_kernels.evl.maps_triton import neighbour_maps_triton
from kineticlip_kernels.evl.tokens_triton import attend_tokens_triton

BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def both_ways(output: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(output, inputs, torch.empty_like(output))


def maps(frames: int, side: int, heads: int) -> None:
    qkv = meta(2, frames, side * side + 1, 3, heads, 64)
    q, k = qkv[:, :, :, 0], qkv[:, :, :, 1]
    both_ways(neighbour_maps_triton(q, k), q, k)


def sums(clips: int, frames: int, side: int, width: int, dtype: torch.dtype = BF16) -> None:
    inputs = [meta(2, clips, frames - 1, side * side, side * side)]
    inputs += [meta((2 * side - 1) ** 2, width, dtype=dtype) for _ in range(2)]
    both_ways(displacement_triton(*inputs, grid=(side, side)), *inputs)


def attend(clips: int, frames: int, count: int, width: int, heads: int) -> None:
    """bf16 tokens under fp32 parameters, everything wanted."""
    query, tokens = meta(clips, heads, width, dtype=FP32), meta(clips, frames, count, width)
    terms: dict[str, Any] = {
        "conv_weight": meta(width, 1, 3, dtype=FP32),
        "conv_bias": meta(width, dtype=FP32),
        "position": meta(frames, width, dtype=FP32),
        "motion": meta(clips, frames, count - 1, width),
    }
    both_ways(attend_tokens_triton(query, tokens, **terms), query, tokens, *terms.values())


CASES = {
    "neighbour_maps B/16": lambda: maps(8, 14, 12),
    "displacement fp32, 1 clip": lambda: sums(1, 8, 14, 768, FP32),
    "displacement fp32, 8 clips": lambda: sums(8, 8, 14, 768, FP32),
    "displacement B/16, 1 clip": lambda: sums(1, 8, 14, 768),
    "displacement B/16, 8 clips": lambda: sums(8, 8, 14, 768),
    "displacement L/14-336": lambda: sums(1, 32, 24, 1024),
    "attend_tokens L/14-336": lambda: attend(1, 32, 577, 1024, 16),
    "attend_tokens at its limits": lambda: attend(1, 8, 50, 2048, 16),
}

KINDS = {
    "evl.maps_triton._log_sums": "matrix",
    "evl.maps_triton._maps": "matrix",
    "evl.maps_backward_triton._grad_q": "matrix",
    "evl.maps_backward_triton._grad_k": "matrix",
    "evl.displacement_triton._sums": "matrix",
    "evl.displacement_backward_triton._grad_maps": "matrix",
    "evl.displacement_backward_triton._grad_weights": "matrix",
    "evl.terms_triton._scores": "memory",
    "evl.tokens_triton._mix": "memory",
    "evl.tokens_backward_triton._gradients": "memory",
    "evl.tokens_backward_triton._grad_tokens": "memory",
}
