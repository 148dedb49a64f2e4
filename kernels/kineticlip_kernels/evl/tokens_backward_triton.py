"""Triton twin of `attend_tokens`, backwards: gradients of the query, the tokens and every term.

The first kernel is the forward's, with dmixed for a query. The second needs no reduction over
channels: with w = (weight, slope) over the rows r = (dmixed, query), dz = w r, so mean(dz) =
w mean(r) and mean(dz z) = w (r z) / C, known from the scores. Letters: see ops.py; M = B * T
frames.
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
    Terms,
    frame_tile,
    launch_scores,
    normalised,
    sum_terms,
    term_arguments,
    vector,
)
from kineticlip_kernels.launch import ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _store_gradients(
    grad_f, motion_ptr, f_ptr, image, token, column, valid, count, C: tl.constexpr
):
    """One tile of df to where it is wanted: the gradient of the motion, and of f itself."""
    if motion_ptr is not None:
        target = motion_ptr + image * (count - 1) * C
        value = grad_f.to(motion_ptr.dtype.element_ty)
        moved = valid & (token > 0)[:, None]
        tl.store(target + (token - 1)[:, None] * C + column[None, :], value, mask=moved)
    if f_ptr is not None:
        target = f_ptr + image * count * C
        tl.store(target + token[:, None] * C + column[None, :], grad_f, mask=valid)


@triton.jit
def _tap_sums(grad_f, tokens_ptr, strides, image, token, column, valid, frames):
    """Sums over a tile's tokens of df times the frame before, this one and the one after."""
    stride_t, stride_n = strides[1], strides[2]
    frame = image % frames
    source = tokens_ptr + image // frames * strides[0] + frame * stride_t
    x = frame_tile(source, token, column, stride_n, valid)
    centre = tl.sum(grad_f * x, axis=0)
    x = frame_tile(source - stride_t, token, column, stride_n, valid & (frame > 0))
    before = tl.sum(grad_f * x, axis=0)
    x = frame_tile(source + stride_t, token, column, stride_n, valid & (frame < frames - 1))
    return before, centre, tl.sum(grad_f * x, axis=0)


@triton.jit
def _store_terms(ptr, image, column, before, centre, after, added, C: tl.constexpr):
    """Three taps, then everything added to f, of one frame."""
    ptr += image * 4 * C
    tl.store(ptr + column, before, mask=column < C)
    tl.store(ptr + C + column, centre, mask=column < C)
    tl.store(ptr + 2 * C + column, after, mask=column < C)
    tl.store(ptr + 3 * C + column, added, mask=column < C)


@triton.jit
def _gradients(
    terms,
    weights_ptr,  # fp32 [M, N, R], R = 2 Q: weights, then slopes
    rows_ptr,  # fp32 [B, R, C]: gradients of mixed, then queries
    mean_ptr,  # fp32 [2, M, N]
    rstd_ptr,  # fp32 [M, N]
    shift_ptr,  # fp32 [M, N]: mean over channels of dz
    projection_ptr,  # fp32 [M, N]: mean over channels of dz z
    grad_rows_ptr,  # fp32 [M, R, C]: sum_n weight z
    grad_terms_ptr,  # fp32 [M, 4, C]: three taps, then everything added to f; or None
    grad_motion_ptr,  # [B, T, P, C], or None
    grad_f_ptr,  # fp32 [M, N, C], or None
    strides,
    frames,
    count,
    doubled,  # R
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """df = (dz - mean(dz) - z mean(dz z)) / std, and what follows from it per channel."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    line = tl.arange(0, BLOCK_R)
    inside = (line < doubled)[:, None] & (column < C)[None, :]
    place = (image // frames * doubled + line)[:, None] * C + column[None, :]
    rows = tl.load(rows_ptr + place, mask=inside, other=0.0)
    grad_rows = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    before = tl.zeros([BLOCK_C], dtype=tl.float32)
    centre = tl.zeros([BLOCK_C], dtype=tl.float32)
    after = tl.zeros([BLOCK_C], dtype=tl.float32)
    added = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, count, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        row = image * count + token
        f = sum_terms(terms, strides, image, token, column, frames, count, C)
        rstd = tl.load(rstd_ptr + row, mask=token < count, other=0.0)
        shift = tl.load(shift_ptr + row, mask=token < count, other=0.0)
        projection = tl.load(projection_ptr + row, mask=token < count, other=0.0)
        z = normalised(f, mean_ptr, rstd, row, token < count, count)
        known = (token < count)[:, None] & (line < doubled)[None, :]
        matched = row[:, None] * doubled + line[None, :]
        weight = tl.load(weights_ptr + matched, mask=known, other=0.0)  # [N, R]
        grad_rows = tl.dot(tl.trans(weight), z, grad_rows, input_precision=PRECISION)
        grad_z = tl.dot(weight, rows, input_precision=PRECISION)
        grad_f = (grad_z - shift[:, None] - z * projection[:, None]) * rstd[:, None]
        valid = (token < count)[:, None] & (column < C)[None, :]
        _store_gradients(grad_f, grad_motion_ptr, grad_f_ptr, image, token, column, valid, count, C)
        if grad_terms_ptr is not None:
            added += tl.sum(tl.where(valid, grad_f, 0.0), axis=0)
            if terms[1] is not None:
                taps = _tap_sums(grad_f, terms[0], strides, image, token, column, valid, frames)
                before += taps[0]
                centre += taps[1]
                after += taps[2]
    place = (image * doubled + line)[:, None] * C + column[None, :]
    tl.store(grad_rows_ptr + place, grad_rows, mask=inside)
    if grad_terms_ptr is not None:
        _store_terms(grad_terms_ptr, image, column, before, centre, after, added, C)


@triton.jit
def _grad_tokens(
    grad_f_ptr,  # fp32 [M, N, C]
    conv_ptr,  # [C, 3]
    out_ptr,  # [B, T, N, C]
    frames,
    count,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The convolution backwards, plus the term that skips it."""
    image = tl.program_id(0).to(tl.int64)
    frame = image % frames
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (token < count)[:, None] & (column < C)[None, :]
    here = grad_f_ptr + image * count * C
    total = frame_tile(here, token, column, C, inside) * (1.0 + vector(conv_ptr + 1, column, 3, C))
    later = inside & (frame < frames - 1)
    total += frame_tile(here + count * C, token, column, C, later) * vector(conv_ptr, column, 3, C)
    earlier = inside & (frame > 0)
    part = frame_tile(here - count * C, token, column, C, earlier)
    total += part * vector(conv_ptr + 2, column, 3, C)
    place = image * count * C + token[:, None] * C + column[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


def attend_tokens_backward(
    flags: list[bool],
    query: Tensor,
    tokens: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    position: Tensor | None,
    motion: Tensor | None,
    scores: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
    eps: float,
) -> list[Tensor]:
    """-> gradients of the six inputs, empty where there is none or no wish for it.

    Parameters as torch.library wants them, each tensor by itself.
    """
    terms = term_arguments(tokens, conv_weight, conv_bias, position, motion)
    grad = grad.float()
    upper = launch_scores(terms, grad, eps)[0].flatten(1, 2)  # dmixed . z, [B, T * N, Q]
    scores = scores.flatten(1, 2)
    weights = scores.softmax(dim=1)
    slopes = weights * (upper - (weights * upper).sum(dim=1, keepdim=True))
    both = torch.cat([weights, slopes], dim=2)  # [B, T * N, R]
    rows = torch.cat([grad, query.float()], dim=1)  # [B, R, C]
    shift = (both @ rows.mean(dim=2, keepdim=True)).squeeze(2)  # [B, T * N]
    projection = (weights * upper + slopes * scores).sum(dim=2) / tokens.shape[3]
    statistics = (mean, rstd, shift, projection)
    grad_rows, grad_terms, grad_f, grad_motion = _launch_gradients(
        flags, terms, both, rows, statistics
    )
    by_frame = grad_rows.unflatten(0, tokens.shape[:2])  # [B, T, R, C]
    grad_query = by_frame[:, :, query.shape[1] :].sum(dim=1).to(query.dtype)
    grad_tokens = tokens.new_empty(0)
    if flags[1]:
        grad_tokens = _launch_grad_tokens(grad_f, conv_weight, tokens.dtype)
    by_frame = grad_terms.unflatten(0, tokens.shape[:2])  # [B, T, 4, C]
    sums = (
        by_frame[:, :, :3].sum(dim=(0, 1)).t().unsqueeze(1),
        by_frame[:, :, 3].sum(dim=(0, 1)),
        by_frame[:, :, 3].sum(dim=0),
    )
    given = [
        tokens.new_empty(0) if term is None or not wanted else value.to(term.dtype).contiguous()
        for term, wanted, value in zip(
            (conv_weight, conv_bias, position), flags[2:5], sums, strict=True
        )
    ]
    return [grad_query, grad_tokens, *given, grad_motion]


def _launch_gradients(
    flags: list[bool], terms: Terms, both: Tensor, rows: Tensor, statistics: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the four outputs of `_gradients`, the last two empty where nobody wants them."""
    tokens, motion = terms[0], terms[4]
    clips, frames, count, width = tokens.shape
    images, doubled, device = clips * frames, both.shape[2], tokens.device
    fp32 = torch.float32
    grad_rows = launch.empty(images, doubled, width, dtype=fp32, device=device)
    grad_terms = launch.empty(images, 4, width, dtype=fp32, device=device)
    grad_f = launch.empty(*(tokens.shape if flags[1] else (0,)), dtype=fp32, device=device)
    grad_motion = tokens.new_empty(0)
    if motion is not None and flags[5]:
        grad_motion = launch.empty(*motion.shape, dtype=motion.dtype, device=device)
    if tokens.numel():
        block = blocks("attend_tokens_gradients", device)
        _gradients[(images, ceil_div(width, block["BLOCK_C"]))](
            terms,
            both,
            rows,
            *statistics,
            grad_rows,
            grad_terms if any(flags[2:5]) else None,
            grad_motion if flags[5] else None,
            grad_f if flags[1] else None,
            tokens.stride()[:3],
            frames,
            count,
            doubled,
            C=width,
            BLOCK_R=max(power_of_two(doubled), 16),
            **block,
        )
    return grad_rows, grad_terms, grad_f, grad_motion


def _launch_grad_tokens(grad_f: Tensor, conv_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    if conv_weight is None:
        return grad_f.to(dtype, copy=True)
    clips, frames, count, width = grad_f.shape
    out = launch.empty(*grad_f.shape, dtype=dtype, device=grad_f.device)
    if out.numel():
        block = blocks("attend_tokens_input", grad_f.device)
        rows, columns = ceil_div(count, block["BLOCK_N"]), ceil_div(width, block["BLOCK_C"])
        _grad_tokens[(clips * frames, rows, columns)](
            grad_f, conv_weight.contiguous(), out, frames, count, C=width, **block
        )
    return out
