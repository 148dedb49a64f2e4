"""What the kernels of `attend_tokens` share: f of a tile, and the scores of the queries.

f is the sum of up to five terms; it and z, f normalised over the channels, exist in registers
only. Letters: see ops.py; M = B * T frames.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.arithmetic_triton import PRECISION
from kineticlip_kernels.launch import ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks

Terms = tuple[Any, ...]  # tokens, then a tensor or None for each term of `sum_terms`


@triton.jit
def vector(ptr, column, stride: tl.constexpr, C: tl.constexpr):
    return tl.load(ptr + column * stride, mask=column < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def frame_tile(tokens_ptr, token, column, stride_n, exists):
    """Tokens of one frame, fp32 [tokens, channels]; zeros where there is nothing."""
    place = token[:, None] * stride_n + column[None, :]
    return tl.load(tokens_ptr + place, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def sum_terms(terms, strides, image, token, column, frames, count, C: tl.constexpr):
    """f of one tile, fp32 [tokens, channels]; zeros outside.

    terms: tokens [B, T, N, C] with the given strides of B, T and N; then, each None where it is
    left out, taps [C, 3] and bias [C] of the convolution, position [T, C], motion [B, T, P, C].
    """
    tokens_ptr, conv_ptr, bias_ptr, position_ptr, motion_ptr = terms
    stride_b, stride_t, stride_n = strides
    frame = image % frames
    inside = (token < count)[:, None] & (column < C)[None, :]
    tokens_ptr += image // frames * stride_b + frame * stride_t
    f = frame_tile(tokens_ptr, token, column, stride_n, inside)
    if conv_ptr is not None:
        f *= 1.0 + vector(conv_ptr + 1, column, 3, C)
        before = frame_tile(tokens_ptr - stride_t, token, column, stride_n, inside & (frame > 0))
        f += before * vector(conv_ptr, column, 3, C)
        later = inside & (frame < frames - 1)
        after = frame_tile(tokens_ptr + stride_t, token, column, stride_n, later)
        f += after * vector(conv_ptr + 2, column, 3, C)
    if bias_ptr is not None:
        f += vector(bias_ptr, column, 1, C)
    if position_ptr is not None:
        f += vector(position_ptr + frame * C, column, 1, C)
    if motion_ptr is not None:
        motion_ptr += image * (count - 1) * C
        place = (token - 1)[:, None] * C + column[None, :]
        moved = inside & (token > 0)[:, None]
        f += tl.load(motion_ptr + place, mask=moved, other=0.0).to(tl.float32)
    return tl.where(inside, f, 0.0)


@triton.jit
def normalised(f, mean_ptr, rstd, row, known, count):
    """z of one tile; the mean is taken off in two parts."""
    shift = tl.load(mean_ptr + row, mask=known, other=0.0)
    mean = tl.load(mean_ptr + tl.num_programs(0) * count + row, mask=known, other=0.0)
    return (f - shift[:, None] - mean[:, None]) * rstd[:, None]


@triton.jit
def _scores(
    terms,
    query_ptr,  # [B, Q, C]
    scores_ptr,  # fp32 [M, N, Q]
    mean_ptr,  # fp32 [2, M, N]: shift, mean - shift
    rstd_ptr,  # fp32 [M, N]
    strides,
    frames,
    count,
    heads,
    eps,
    C: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """query . z, from one pass over f: sums of d, d d and query d, where d = f - shift.

    The shift is the mean over the first channels, so that a large common mean does not cancel.
    """
    image = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.arange(0, BLOCK_Q)
    query_ptr += image // frames * heads * C
    column = tl.arange(0, BLOCK_C)
    f = sum_terms(terms, strides, image, token, column, frames, count, C)
    shift = tl.sum(f, axis=1) / min(BLOCK_C, C)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    square = tl.zeros([BLOCK_N], dtype=tl.float32)
    product = tl.zeros([BLOCK_N, BLOCK_Q], dtype=tl.float32)
    query_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        channel = start + column
        f = sum_terms(terms, strides, image, token, channel, frames, count, C)
        d = tl.where((channel < C)[None, :], f - shift[:, None], 0.0)
        total += tl.sum(d, axis=1)
        square += tl.sum(d * d, axis=1)
        inside = (head < heads)[:, None] & (channel < C)[None, :]
        place = head[:, None] * C + channel[None, :]
        query = tl.load(query_ptr + place, mask=inside, other=0.0).to(tl.float32)
        query_sum += tl.sum(query, axis=1)
        product = tl.dot(d, tl.trans(query), product, input_precision=PRECISION)
    mean = total / C
    rstd = 1.0 / tl.sqrt(square / C - mean * mean + eps)
    scores = rstd[:, None] * (product - mean[:, None] * query_sum[None, :])
    row = image * count + token
    inside = (token < count)[:, None] & (head < heads)[None, :]
    tl.store(scores_ptr + row[:, None] * heads + head[None, :], scores, mask=inside)
    # The mean in two parts: their sum would lose what the shift has saved.
    tl.store(mean_ptr + row, shift, mask=token < count)
    tl.store(mean_ptr + tl.num_programs(0) * count + row, mean, mask=token < count)
    tl.store(rstd_ptr + row, rstd, mask=token < count)


def launch_scores(terms: Terms, query: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> (query . z [B, T, N, Q], mean [2, B, T, N] and 1 / std [B, T, N] of f), fp32."""
    tokens = terms[0]
    clips, frames, count, width = tokens.shape
    heads, device = query.shape[1], tokens.device
    scores = launch.empty(clips, frames, count, heads, dtype=torch.float32, device=device)
    mean = launch.empty(2, clips, frames, count, dtype=torch.float32, device=device)
    rstd = launch.empty(clips, frames, count, dtype=torch.float32, device=device)
    if scores.numel():
        block = blocks("attend_tokens_scores", device)
        _scores[(clips * frames, ceil_div(count, block["BLOCK_N"]))](
            terms,
            query.contiguous(),
            scores,
            mean,
            rstd,
            tokens.stride()[:3],
            frames,
            count,
            heads,
            eps,
            C=width,
            BLOCK_Q=max(power_of_two(heads), 16),
            **block,
        )
    return scores, mean, rstd


def term_arguments(tokens: Tensor, *others: Tensor | None) -> Terms:
    """The addends of f as the kernels read them; tokens keep gaps between rows."""
    return (
        launch.readable(tokens),
        *(None if term is None else term.contiguous() for term in others),
    )
