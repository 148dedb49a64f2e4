"""The backward pass of `neighbour_maps` in Triton, attention recomputed from its log sums.

Letters: see ops.py; pairs: see pairs_triton.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.evl.pairs_triton import alike, patch_rows, scores_of
from kineticlip_kernels.launch import ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _upper(grad_ptr, row, column, patches):
    """Gradient of the map at [rows, columns], fp32."""
    inside = (row < patches)[:, None] & (column < patches)[None, :]
    place = row[:, None] * patches + column[None, :]
    return tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _dot_exact(a, b, total):
    """total + a @ b for fp32 a: what 16 bits lose of a goes into a second product."""
    high = a.to(b.dtype)
    total = tl.dot(high, b, total, input_precision="ieee")
    if b.dtype != tl.float32:
        total = tl.dot((a - high.to(tl.float32)).to(b.dtype), b, total)
    return total


@triton.jit
def _grad_q(
    q_ptr,
    k_ptr,
    log_sum_ptr,  # fp32 [2, B, T - 1, H, P]
    grad_ptr,  # [2, B, T - 1, P, P]
    mean_ptr,  # fp32 [2, B, T - 1, H, P], written: sum_r weight * grad of every score row
    grad_q_ptr,  # [B, T, N, H, K] from the first patch on, contiguous
    strides,
    sizes,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dq_p = scale sum_r weight (g / H - sum_r weight g / H) k_r, over both neighbours."""
    stride_b, stride_t, stride_n, stride_h = strides
    clips, pairs, heads, patches = sizes
    image, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    clip, frame = image // (pairs + 1), image % (pairs + 1)
    here = clip * stride_b + frame * stride_t + head * stride_h
    row = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = patch_rows(q_ptr + here, row, stride_n, patches, K, BLOCK_K)
    total = tl.zeros([BLOCK_P, BLOCK_K], dtype=tl.float32)
    for direction in tl.static_range(2):
        # Direction 0 looks back: no pair for the first frame. 1: none for the last.
        if direction == 0:
            pair, exists = clip * pairs + frame - 1, frame > 0
            there = k_ptr + here - stride_t
        else:
            pair, exists = (clips + clip) * pairs + frame, frame < pairs
            there = k_ptr + here + stride_t
        columns = tl.where(exists, patches, 0)
        place = (pair * heads + head) * patches + row
        mask = (row < patches) & exists
        log_sum = tl.load(log_sum_ptr + place, mask=mask, other=0.0)
        upper_ptr = grad_ptr + pair * patches * patches
        mean = tl.zeros([BLOCK_P], dtype=tl.float32)
        for start in range(0, columns, BLOCK_R):
            column = start + tl.arange(0, BLOCK_R)
            k = patch_rows(there, column, stride_n, patches, K, BLOCK_K)
            weight = tl.exp(scores_of(q, k, column, patches, scale) - log_sum[:, None])
            mean += tl.sum(weight * _upper(upper_ptr, row, column, patches), axis=1) / heads
        tl.store(mean_ptr + place, mean, mask=mask)
        for start in range(0, columns, BLOCK_R):
            column = start + tl.arange(0, BLOCK_R)
            k = patch_rows(there, column, stride_n, patches, K, BLOCK_K)
            weight = tl.exp(scores_of(q, k, column, patches, scale) - log_sum[:, None])
            slope = weight * (_upper(upper_ptr, row, column, patches) / heads - mean[:, None])
            total = _dot_exact(slope, k, total)
    lane = tl.arange(0, BLOCK_K)
    grad_q_ptr += (image * (patches + 1) * heads + head) * K
    place = row[:, None] * (heads * K) + lane[None, :]
    inside = (row < patches)[:, None] & (lane < K)[None, :]
    tl.store(grad_q_ptr + place, (total * scale).to(grad_q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grad_k(
    q_ptr,
    k_ptr,
    log_sum_ptr,  # fp32 [2, B, T - 1, H, P]
    grad_ptr,  # [2, B, T - 1, P, P]
    mean_ptr,  # fp32 [2, B, T - 1, H, P], what _grad_q wrote
    grad_k_ptr,  # [B, T, N, H, K] from the first patch on, contiguous
    strides,
    sizes,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dk_r = scale sum_p weight (g / H - mean_p) q_p, over both neighbours."""
    stride_b, stride_t, stride_n, stride_h = strides
    clips, pairs, heads, patches = sizes
    image, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    clip, frame = image // (pairs + 1), image % (pairs + 1)
    here = clip * stride_b + frame * stride_t + head * stride_h
    column = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = patch_rows(k_ptr + here, column, stride_n, patches, K, BLOCK_K)
    total = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for direction in tl.static_range(2):
        # Who looks at this frame: in direction 0 the next frame, in direction 1 the previous.
        if direction == 0:
            pair, exists = clip * pairs + frame, frame < pairs
            there = q_ptr + here + stride_t
        else:
            pair, exists = (clips + clip) * pairs + frame - 1, frame > 0
            there = q_ptr + here - stride_t
        upper_ptr = grad_ptr + pair * patches * patches
        for start in range(0, tl.where(exists, patches, 0), BLOCK_P):
            row = start + tl.arange(0, BLOCK_P)
            q = patch_rows(there, row, stride_n, patches, K, BLOCK_K)
            place = (pair * heads + head) * patches + row
            # Rows past the last patch: their log sum is infinite, so their weights are zero.
            log_sum = tl.load(log_sum_ptr + place, mask=row < patches, other=float("inf"))
            mean = tl.load(mean_ptr + place, mask=row < patches, other=0.0)
            weight = tl.exp(scores_of(q, k, column, patches, scale) - log_sum[:, None])
            slope = weight * (_upper(upper_ptr, row, column, patches) / heads - mean[:, None])
            total = _dot_exact(tl.trans(slope), q, total)
    lane = tl.arange(0, BLOCK_K)
    grad_k_ptr += (image * (patches + 1) * heads + head) * K
    place = column[:, None] * (heads * K) + lane[None, :]
    inside = (column < patches)[:, None] & (lane < K)[None, :]
    tl.store(grad_k_ptr + place, (total * scale).to(grad_k_ptr.dtype.element_ty), mask=inside)


def launch_backward(
    flags: list[bool], q: Tensor, k: Tensor, log_sums: Tensor, grad: Tensor
) -> list[Tensor]:
    clips, frames, count, heads, width = q.shape
    q, k = alike(q, k)
    patches, pairs = count - 1, frames - 1
    grad_q = launch.empty(*q.shape, dtype=q.dtype, device=q.device)
    grad_k = launch.empty(*q.shape, dtype=q.dtype, device=q.device)
    if grad.numel() == 0:
        return [grad_q.zero_(), grad_k.zero_()]
    grad_q[:, :, 0] = 0
    grad_k[:, :, 0] = 0
    grad, mean = grad.contiguous(), torch.empty_like(log_sums)
    arguments = (q.stride()[:4], (clips, pairs, heads, patches), width**-0.5)
    shape = {"K": width, "BLOCK_K": max(power_of_two(width), 16)}
    block = blocks("neighbour_gradients", q.device)
    steps = {name: ceil_div(patches, block[name]) for name in ("BLOCK_P", "BLOCK_R")}
    q_patches, k_patches = q[:, :, 1:], k[:, :, 1:]
    _grad_q[(clips * frames, heads, steps["BLOCK_P"])](
        q_patches, k_patches, log_sums, grad, mean, grad_q[:, :, 1:], *arguments, **shape, **block
    )
    _grad_k[(clips * frames, heads, steps["BLOCK_R"])](
        q_patches, k_patches, log_sums, grad, mean, grad_k[:, :, 1:], *arguments, **shape, **block
    )
    return [grad_q, grad_k]
