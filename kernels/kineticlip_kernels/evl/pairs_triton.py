"""What both directions of `neighbour_maps` share in Triton. Letters: see ops.py.

A pair (d, b, t) is direction d of frames t and t + 1: in direction 0 frame t + 1 looks at t, in
direction 1 frame t looks at t + 1.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch


@triton.jit
def patch_rows(ptr, row, stride_n, count, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Patches `row` of one frame and head, [rows, K]; zeros past the last."""
    lane = tl.arange(0, BLOCK_K)
    place = row[:, None] * stride_n + lane[None, :]
    return tl.load(ptr + place, mask=(row < count)[:, None] & (lane < K)[None, :], other=0.0)


@triton.jit
def scores_of(q, k, column, count, scale):
    """scale * q k^T in fp32; -inf where the column is no patch."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where((column < count)[None, :], scores, float("-inf"))


def alike(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with equal strides and neighbouring channels, which the kernels assume."""
    if q.stride() == k.stride() and q.stride(-1) == 1 and launch.near(q):
        return q, k
    return q.contiguous(), k.contiguous()
