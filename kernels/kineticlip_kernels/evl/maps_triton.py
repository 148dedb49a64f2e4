"""Triton twin of `neighbour_maps`: attention between neighbouring frames, averaged over heads.

A map is one tile of the mean, summed over heads in registers; no head's attention reaches memory.
The first kernel finds log sum exp of every score row, the second the maps; the backward pass
recomputes attention from the same sums. Letters: see ops.py; pairs: see pairs_triton.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.evl.maps_backward_triton import launch_backward
from kineticlip_kernels.evl.pairs_triton import alike, patch_rows, scores_of
from kineticlip_kernels.launch import FusedOp, ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _log_sums(
    q_ptr,  # [B, T, N, H, K], strided, from the first patch on
    k_ptr,  # the same, strides equal
    out_ptr,  # fp32 [2, B, T - 1, H, P]
    strides,  # of q and k: B, T, N, H
    sizes,  # B, T - 1, H, P
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    stride_b, stride_t, stride_n, stride_h = strides
    clips, pairs, heads, patches = sizes
    pair, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    back = pair < clips * pairs  # direction 0
    frame = (pair // pairs % clips) * stride_b + (pair % pairs) * stride_t + head * stride_h
    q_ptr += frame + tl.where(back, stride_t, 0)
    k_ptr += frame + tl.where(back, 0, stride_t)
    row = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = patch_rows(q_ptr, row, stride_n, patches, K, BLOCK_K)
    top = tl.full([BLOCK_P], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    for start in range(0, patches, BLOCK_R):
        column = start + tl.arange(0, BLOCK_R)
        k = patch_rows(k_ptr, column, stride_n, patches, K, BLOCK_K)
        scores = scores_of(q, k, column, patches, scale)
        new = tl.maximum(top, tl.max(scores, axis=1))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(scores - new[:, None]), axis=1)
        top = new
    place = (pair * heads + head) * patches + row
    tl.store(out_ptr + place, top + tl.log(total), mask=row < patches)


@triton.jit
def _maps(
    q_ptr,
    k_ptr,
    log_sum_ptr,  # fp32 [2, B, T - 1, H, P]
    out_ptr,  # [2, B, T - 1, P, P]
    strides,
    sizes,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    stride_b, stride_t, stride_n, stride_h = strides
    clips, pairs, heads, patches = sizes
    pair = tl.program_id(0).to(tl.int64)
    back = pair < clips * pairs
    frame = (pair // pairs % clips) * stride_b + (pair % pairs) * stride_t
    q_ptr += frame + tl.where(back, stride_t, 0)
    k_ptr += frame + tl.where(back, 0, stride_t)
    row = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mean = tl.zeros([BLOCK_P, BLOCK_R], dtype=tl.float32)
    for head in range(heads):
        q = patch_rows(q_ptr + head * stride_h, row, stride_n, patches, K, BLOCK_K)
        k = patch_rows(k_ptr + head * stride_h, column, stride_n, patches, K, BLOCK_K)
        place = (pair * heads + head) * patches + row
        log_sum = tl.load(log_sum_ptr + place, mask=row < patches, other=0.0)
        mean += tl.exp(scores_of(q, k, column, patches, scale) - log_sum[:, None])
    out_ptr += pair * patches * patches
    place = row[:, None] * patches + column[None, :]
    inside = (row < patches)[:, None] & (column < patches)[None, :]
    tl.store(out_ptr + place, (mean / heads).to(out_ptr.dtype.element_ty), mask=inside)


def neighbour_maps_triton(q: Tensor, k: Tensor) -> Tensor:
    """The Triton face of `neighbour_maps`."""
    (maps,) = _neighbour_maps(q, k)
    return maps


def _forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """-> (maps [2, B, T - 1, P, P], log sums fp32 [2, B, T - 1, H, P])."""
    clips, frames, count, heads, width = q.shape
    q, k = alike(q, k)
    patches, pairs = count - 1, frames - 1
    maps = launch.empty(2, clips, pairs, patches, patches, dtype=q.dtype, device=q.device)
    log_sums = launch.empty(2, clips, pairs, heads, patches, dtype=torch.float32, device=q.device)
    if maps.numel() == 0:
        return maps, log_sums
    arguments = (q.stride()[:4], (clips, pairs, heads, patches), width**-0.5)
    shape = {"K": width, "BLOCK_K": max(power_of_two(width), 16)}
    block = blocks("neighbour_log_sums", q.device)
    _log_sums[(2 * clips * pairs, heads, ceil_div(patches, block["BLOCK_P"]))](
        q[:, :, 1:], k[:, :, 1:], log_sums, *arguments, **shape, **block
    )
    block = blocks("neighbour_maps", q.device)
    rows, columns = ceil_div(patches, block["BLOCK_P"]), ceil_div(patches, block["BLOCK_R"])
    _maps[(2 * clips * pairs, rows, columns)](
        q[:, :, 1:], k[:, :, 1:], log_sums, maps, *arguments, **shape, **block
    )
    return maps, log_sums


def _fake_forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    clips, frames, count, heads, _ = q.shape
    shape = (2, clips, frames - 1)
    return (
        q.new_empty(*shape, count - 1, count - 1),
        q.new_empty(*shape, heads, count - 1, dtype=torch.float32),
    )


_neighbour_maps = FusedOp(
    "neighbour_maps",
    _forward,
    launch_backward,
    fake_forward=_fake_forward,
    fake_backward=lambda flags, q, k, log_sums, grad: [q.new_empty(q.shape) for _ in range(2)],
    save=lambda inputs, outputs: ((*inputs, outputs[1]), ()),
    results=1,
    spread=(0, 1),
)
