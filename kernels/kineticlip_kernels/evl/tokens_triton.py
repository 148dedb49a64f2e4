"""Triton twin of `attend_tokens`: convolution, positions, motion, norm and attention fused.

Two kernels stream the tokens, a tile of tokens by channels at a time, and what goes between them
is [B, T * N, Q]: scores (with mean and 1 / std of every token), then sums weighted by softmax.
The backward pass has a file of its own. Letters: see ops.py; M = B * T frames.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.arithmetic_triton import PRECISION
from kineticlip_kernels.evl.terms_triton import (
    launch_scores,
    normalised,
    sum_terms,
    term_arguments,
)
from kineticlip_kernels.evl.tokens_backward_triton import attend_tokens_backward
from kineticlip_kernels.launch import FusedOp, ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _mix(
    terms,
    weights_ptr,  # fp32 [M, N, Q]
    mean_ptr,  # fp32 [2, M, N]
    rstd_ptr,  # fp32 [M, N]
    mixed_ptr,  # fp32 [M, Q, C]
    strides,
    frames,
    count,
    heads,
    C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """sum_n weight_n z_n over the tokens of one frame, for a block of channels."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    head = tl.arange(0, BLOCK_Q)
    total = tl.zeros([BLOCK_Q, BLOCK_C], dtype=tl.float32)
    for start in range(0, count, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        row = image * count + token
        f = sum_terms(terms, strides, image, token, column, frames, count, C)
        rstd = tl.load(rstd_ptr + row, mask=token < count, other=0.0)
        inside = (token < count)[None, :] & (head < heads)[:, None]
        place = row[None, :] * heads + head[:, None]
        weight = tl.load(weights_ptr + place, mask=inside, other=0.0)
        z = normalised(f, mean_ptr, rstd, row, token < count, count)
        total = tl.dot(weight, z, total, input_precision=PRECISION)
    inside = (head < heads)[:, None] & (column < C)[None, :]
    place = (image * heads + head)[:, None] * C + column[None, :]
    tl.store(mixed_ptr + place, total, mask=inside)


def attend_tokens_triton(
    query: Tensor,
    tokens: Tensor,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    position: Tensor | None = None,
    motion: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The Triton face of `attend_tokens`."""
    (mixed,) = _attend_tokens(query, tokens, conv_weight, conv_bias, position, motion, eps)
    return mixed


def _forward(
    query: Tensor,
    tokens: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    position: Tensor | None,
    motion: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (mixed [B, Q, C], and what launch_scores gives)."""
    clips, frames, count, width = tokens.shape
    terms = term_arguments(tokens, conv_weight, conv_bias, position, motion)
    scores, mean, rstd = launch_scores(terms, query, eps)
    weights = scores.flatten(1, 2).softmax(dim=1)  # [B, T * N, Q]
    heads = query.shape[1]
    partial = launch.empty(clips * frames, heads, width, dtype=torch.float32, device=tokens.device)
    if partial.numel():
        block = blocks("attend_tokens_mix", tokens.device)
        _mix[(clips * frames, ceil_div(width, block["BLOCK_C"]))](
            terms,
            weights,
            mean,
            rstd,
            partial,
            terms[0].stride()[:3],
            frames,
            count,
            heads,
            C=width,
            BLOCK_Q=max(power_of_two(heads), 16),
            **block,
        )
    mixed = partial.unflatten(0, (clips, frames)).sum(dim=1)  # [B, Q, C]
    return mixed.to(query.dtype), scores, mean, rstd


def _fake_forward(
    query: Tensor, tokens: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores = query.new_empty(*tokens.shape[:3], query.shape[1], dtype=torch.float32)
    mean, rstd = scores.new_empty(2, *tokens.shape[:3]), scores.new_empty(tokens.shape[:3])
    return query.new_empty(query.shape), scores, mean, rstd


def _fake_backward(
    flags: list[bool], query: Tensor, tokens: Tensor, *rest: Tensor | None
) -> list[Tensor]:
    terms = [
        tokens.new_empty(0) if term is None or not flag else term.new_empty(term.shape)
        for term, flag in zip(rest[:4], flags[2:6], strict=True)
    ]
    found = [query.new_empty(query.shape), tokens.new_empty(tokens.shape if flags[1] else 0)]
    return [*found, *terms]


_attend_tokens = FusedOp(
    "attend_tokens",
    _forward,
    attend_tokens_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda inputs, outputs: ((*inputs[:6], *outputs[1:]), inputs[6:]),
    results=1,
    spread=(0, 1, 2, 3, 4, 5),
)
