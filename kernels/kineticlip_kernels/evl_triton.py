"""Triton twin of `attend_tokens`: convolution, positions, motion, norm and attention fused.

Three kernels stream the tokens, a tile of tokens by channels at a time; f and z exist in registers
only, and what goes between kernels is [B, T * N, Q]: scores (with mean and 1 / std of every
token), then sums weighted by softmax. The backward pass takes dmixed for a query in the first
kernel, and the third needs no reduction over channels: with w = (weight, slope) over the rows
r = (dmixed, query), dz = w r, so mean(dz) = w mean(r) and mean(dz z) = w (r z) / C, known from
the scores. Letters: see evl.py; M = B * T frames.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.launch import FusedOp, ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks

# Three products of 19-bit floats: fp32 accuracy on tensor cores. The kernels are memory-bound.
PRECISION = tl.constexpr("tf32x3")

Terms = tuple[Any, ...]  # tokens, then a tensor or None for each term of `_sum_terms`


@triton.jit
def _vector(ptr, column, stride: tl.constexpr, C: tl.constexpr):
    return tl.load(ptr + column * stride, mask=column < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _frame(tokens_ptr, token, column, stride_n, exists):
    """Tokens of one frame, fp32 [tokens, channels]; zeros where there is nothing."""
    place = token[:, None] * stride_n + column[None, :]
    return tl.load(tokens_ptr + place, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _sum_terms(terms, strides, image, token, column, frames, count, C: tl.constexpr):
    """f of one tile, fp32 [tokens, channels]; zeros outside.

    terms: tokens [B, T, N, C] with the given strides of B, T and N; then, each None where it is
    left out, taps [C, 3] and bias [C] of the convolution, position [T, C], motion [B, T, P, C].
    """
    tokens_ptr, conv_ptr, bias_ptr, position_ptr, motion_ptr = terms
    stride_b, stride_t, stride_n = strides
    frame = image % frames
    inside = (token < count)[:, None] & (column < C)[None, :]
    tokens_ptr += image // frames * stride_b + frame * stride_t
    f = _frame(tokens_ptr, token, column, stride_n, inside)
    if conv_ptr is not None:
        f *= 1.0 + _vector(conv_ptr + 1, column, 3, C)
        before = _frame(tokens_ptr - stride_t, token, column, stride_n, inside & (frame > 0))
        f += before * _vector(conv_ptr, column, 3, C)
        later = inside & (frame < frames - 1)
        after = _frame(tokens_ptr + stride_t, token, column, stride_n, later)
        f += after * _vector(conv_ptr + 2, column, 3, C)
    if bias_ptr is not None:
        f += _vector(bias_ptr, column, 1, C)
    if position_ptr is not None:
        f += _vector(position_ptr + frame * C, column, 1, C)
    if motion_ptr is not None:
        motion_ptr += image * (count - 1) * C
        place = (token - 1)[:, None] * C + column[None, :]
        moved = inside & (token > 0)[:, None]
        f += tl.load(motion_ptr + place, mask=moved, other=0.0).to(tl.float32)
    return tl.where(inside, f, 0.0)


@triton.jit
def _normalised(f, mean_ptr, rstd, row, known, count):
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
    f = _sum_terms(terms, strides, image, token, column, frames, count, C)
    shift = tl.sum(f, axis=1) / min(BLOCK_C, C)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    square = tl.zeros([BLOCK_N], dtype=tl.float32)
    product = tl.zeros([BLOCK_N, BLOCK_Q], dtype=tl.float32)
    query_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        channel = start + column
        f = _sum_terms(terms, strides, image, token, channel, frames, count, C)
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
        f = _sum_terms(terms, strides, image, token, column, frames, count, C)
        rstd = tl.load(rstd_ptr + row, mask=token < count, other=0.0)
        inside = (token < count)[None, :] & (head < heads)[:, None]
        place = row[None, :] * heads + head[:, None]
        weight = tl.load(weights_ptr + place, mask=inside, other=0.0)
        z = _normalised(f, mean_ptr, rstd, row, token < count, count)
        total = tl.dot(weight, z, total, input_precision=PRECISION)
    inside = (head < heads)[:, None] & (column < C)[None, :]
    place = (image * heads + head)[:, None] * C + column[None, :]
    tl.store(mixed_ptr + place, total, mask=inside)


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
    frame = image % frames
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
        f = _sum_terms(terms, strides, image, token, column, frames, count, C)
        rstd = tl.load(rstd_ptr + row, mask=token < count, other=0.0)
        shift = tl.load(shift_ptr + row, mask=token < count, other=0.0)
        projection = tl.load(projection_ptr + row, mask=token < count, other=0.0)
        z = _normalised(f, mean_ptr, rstd, row, token < count, count)
        known = (token < count)[:, None] & (line < doubled)[None, :]
        matched = row[:, None] * doubled + line[None, :]
        weight = tl.load(weights_ptr + matched, mask=known, other=0.0)  # [N, R]
        grad_rows = tl.dot(tl.trans(weight), z, grad_rows, input_precision=PRECISION)
        grad_z = tl.dot(weight, rows, input_precision=PRECISION)
        grad_f = (grad_z - shift[:, None] - z * projection[:, None]) * rstd[:, None]
        valid = (token < count)[:, None] & (column < C)[None, :]
        if grad_motion_ptr is not None:
            target = grad_motion_ptr + image * (count - 1) * C
            value = grad_f.to(grad_motion_ptr.dtype.element_ty)
            moved = valid & (token > 0)[:, None]
            tl.store(target + (token - 1)[:, None] * C + column[None, :], value, mask=moved)
        if grad_f_ptr is not None:
            target = grad_f_ptr + image * count * C
            tl.store(target + token[:, None] * C + column[None, :], grad_f, mask=valid)
        if grad_terms_ptr is not None:
            added += tl.sum(tl.where(valid, grad_f, 0.0), axis=0)
            if terms[1] is not None:
                stride_t, stride_n = strides[1], strides[2]
                source = terms[0] + image // frames * strides[0] + frame * stride_t
                x = _frame(source, token, column, stride_n, valid)
                centre += tl.sum(grad_f * x, axis=0)
                x = _frame(source - stride_t, token, column, stride_n, valid & (frame > 0))
                before += tl.sum(grad_f * x, axis=0)
                later = valid & (frame < frames - 1)
                x = _frame(source + stride_t, token, column, stride_n, later)
                after += tl.sum(grad_f * x, axis=0)
    place = (image * doubled + line)[:, None] * C + column[None, :]
    tl.store(grad_rows_ptr + place, grad_rows, mask=inside)
    if grad_terms_ptr is not None:
        grad_terms_ptr += image * 4 * C
        tl.store(grad_terms_ptr + column, before, mask=column < C)
        tl.store(grad_terms_ptr + C + column, centre, mask=column < C)
        tl.store(grad_terms_ptr + 2 * C + column, after, mask=column < C)
        tl.store(grad_terms_ptr + 3 * C + column, added, mask=column < C)


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
    total = _frame(here, token, column, C, inside) * (1.0 + _vector(conv_ptr + 1, column, 3, C))
    later = inside & (frame < frames - 1)
    total += _frame(here + count * C, token, column, C, later) * _vector(conv_ptr, column, 3, C)
    earlier = inside & (frame > 0)
    part = _frame(here - count * C, token, column, C, earlier)
    total += part * _vector(conv_ptr + 2, column, 3, C)
    place = image * count * C + token[:, None] * C + column[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


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
    """-> (mixed [B, Q, C], and what _launch_scores gives)."""
    clips, frames, count, width = tokens.shape
    terms = _terms(tokens, conv_weight, conv_bias, position, motion)
    scores, mean, rstd = _launch_scores(terms, query, eps)
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


def _launch_scores(terms: Terms, query: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
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


def _backward(
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
    clips, frames, count, width = tokens.shape
    terms = _terms(tokens, conv_weight, conv_bias, position, motion)
    grad = grad.float()
    upper = _launch_scores(terms, grad, eps)[0].flatten(1, 2)  # dmixed . z, [B, T * N, Q]
    scores = scores.flatten(1, 2)
    weights = scores.softmax(dim=1)
    slopes = weights * (upper - (weights * upper).sum(dim=1, keepdim=True))
    both = torch.cat([weights, slopes], dim=2)  # [B, T * N, R]
    rows = torch.cat([grad, query.float()], dim=1)  # [B, R, C]
    shift = (both @ rows.mean(dim=2, keepdim=True)).squeeze(2)  # [B, T * N]
    projection = (weights * upper + slopes * scores).sum(dim=2) / width
    doubled, images, device = both.shape[2], clips * frames, tokens.device
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
            mean,
            rstd,
            shift,
            projection,
            grad_rows,
            grad_terms if any(flags[2:5]) else None,
            grad_motion if flags[5] else None,
            grad_f if flags[1] else None,
            terms[0].stride()[:3],
            frames,
            count,
            doubled,
            C=width,
            BLOCK_R=max(power_of_two(doubled), 16),
            **block,
        )
    grad_query = grad_rows.unflatten(0, (clips, frames))[:, :, doubled // 2 :].sum(dim=1)
    found = [grad_query.to(query.dtype), tokens.new_empty(0)]
    if flags[1]:
        found[1] = _launch_grad_tokens(grad_f, conv_weight, tokens.dtype)
    by_frame = grad_terms.unflatten(0, (clips, frames))  # [B, T, 4, C]
    for term, wanted, value in (
        (conv_weight, flags[2], by_frame[:, :, :3].sum(dim=(0, 1)).t().unsqueeze(1)),
        (conv_bias, flags[3], by_frame[:, :, 3].sum(dim=(0, 1))),
        (position, flags[4], by_frame[:, :, 3].sum(dim=0)),
    ):
        if term is None or not wanted:
            found.append(tokens.new_empty(0))
        else:
            found.append(value.to(term.dtype))
    return [*found, grad_motion]


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


def _terms(tokens: Tensor, *others: Tensor | None) -> Terms:
    """The addends of f as the kernels read them; tokens keep gaps between rows."""
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    return (tokens, *(None if term is None else term.contiguous() for term in others))


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
    _backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda inputs, outputs: ((*inputs[:6], *outputs[1:]), inputs[6:]),
    results=1,
    spread=(0, 1, 2, 3, 4, 5),
)
