"""Sets of keys and values, and tiles of one head: what both directions of attention share.

Shape letters: M images, N tokens (query rows of an image), H heads, K head width. Set 0 of keys
and values is the image's own; each other has M' rows of n tokens, shared by M / M' images.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels.launch import near

LOG2_E = 1.4426950408889634  # the kernels take powers of two


@triton.jit
def load_tile(
    ptr, first, count, token_stride, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr
):
    """Rows first.. of one head, [ROWS, BLOCK_K]; zeros from row `count` and column K on."""
    token, column = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    place = ptr + token[:, None] * token_stride + column[None, :]
    if K == BLOCK_K:
        return tl.load(place, mask=token[:, None] < count, other=0.0)
    else:
        return tl.load(place, mask=(token[:, None] < count) & (column[None, :] < K), other=0.0)


@triton.jit
def store_tile(
    ptr,
    tile,
    first,
    count,
    token_stride,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The other direction."""
    token, column = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    place = ptr + token[:, None] * token_stride + column[None, :]
    inside = (token[:, None] < count) & (column[None, :] < K)
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_queries(
    q_ptr,  # that of the image and head
    grad_ptr,  # that of all, as are the next two
    lse_ptr,
    delta_ptr,
    image,
    head,
    first,
    q_token_stride,
    N,
    H,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """q and d out [BLOCK_M, BLOCK_K], log sums and deltas [BLOCK_M] of tokens first.. of a head."""
    q = load_tile(q_ptr, first, N, q_token_stride, K, BLOCK_K, BLOCK_M)
    grad = load_tile(grad_ptr + image * N * H * K + head * K, first, N, H * K, K, BLOCK_K, BLOCK_M)
    token = first + tl.arange(0, BLOCK_M)
    statistics = (image * H + head) * N + token
    # Rows behind the end get weight 2^-inf = 0.
    lse = tl.load(lse_ptr + statistics, mask=token < N, other=float("inf"))
    delta = tl.load(delta_ptr + statistics, mask=token < N, other=0.0)
    return q, grad, lse, delta


def key_sets(
    qkv: Tensor, flat: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Keys and values of all sets, heads and columns adjacent; set 0 are views of qkv."""
    present = [_heads_adjacent(tensor) for tensor in flat if tensor is not None]
    return (qkv[:, :, 1], *present[::2]), (qkv[:, :, 2], *present[1::2])


def _heads_adjacent(x: Tensor) -> Tensor:
    return x if x.stride()[2:] == (x.shape[3], 1) and near(x) else x.contiguous()


def set_arguments(
    images: int, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...], tuple[int, ...]]:
    """(strides, lengths, shares) of the sets."""
    strides = tuple((*k.stride()[:2], *v.stride()[:2]) for k, v in zip(keys, values, strict=True))
    lengths = tuple(k.shape[1] for k in keys)
    return strides, lengths, tuple(images // len(k) for k in keys)
