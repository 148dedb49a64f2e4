"""Floating-point operations and bytes of the trunk's ops: what a benchmark divides by its time.

Bytes are what must pass between memory and the chip once: operands read, results written, nothing
read twice. A multiplication and its addition are two operations. Elementwise work counts as
bytes only. Backward counts the backward pass alone, of one that keeps what the kernels keep.
Shape letters: R rows, D width in, F width out, M images, N tokens, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Operations on tensor cores, and bytes moved."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The time under which no implementation can stay, at these measured limits."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def layer_norm(rows: int, width: int, itemsize: int, *, backward: bool = False) -> Cost:
    """x read, y written; backward: x and dy read, dx written."""
    return Cost(0, (3 if backward else 2) * rows * width * itemsize)


def add_layer_norm(rows: int, width: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Two read, two written; backward: sum, its gradient and dy read, one gradient written."""
    return Cost(0, 4 * rows * width * itemsize)


def bias_quick_gelu(rows: int, width: int, itemsize: int, *, backward: bool = False) -> Cost:
    """x read, y written; backward: x and dy read, dx written."""
    return Cost(0, (3 if backward else 2) * rows * width * itemsize)


def linear(rows: int, depth: int, width: int, itemsize: int, *, out_itemsize: int = 0) -> Cost:
    """One matrix product [R, D] x [D, F]; out_itemsize: of the result, where it differs."""
    operands = (rows * depth + width * depth) * itemsize
    return Cost(2.0 * rows * depth * width, operands + rows * width * (out_itemsize or itemsize))


def linear_quick_gelu(
    rows: int, depth: int, width: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """One matrix product; backward: the activation's, then one each for input and weight."""
    if not backward:
        return linear(rows, depth, width, itemsize)
    products = linear(rows, width, depth, itemsize) + linear(width, rows, depth, itemsize)
    return products + bias_quick_gelu(rows, width, itemsize, backward=True)


def attention(
    images: int,
    tokens: int,
    heads: int,
    width: int,
    itemsize: int,
    *,
    sources: Sequence[tuple[int, int]] = (),
    backward: bool = False,
) -> Cost:
    """Two products of N x S x K a head and image, five backward; sources: (M', n) pairs.

    Backward: qkv, out and d out read, d qkv written.
    """
    keys = tokens + sum(n for _, n in sources)
    product = 2.0 * images * heads * tokens * keys * width
    row = heads * width * itemsize
    extra = 2 * row * sum(rows * n for rows, n in sources)
    if backward:
        return Cost(5 * product, 8 * images * tokens * row + 2 * extra)
    return Cost(2 * product, 4 * images * tokens * row + extra)


def class_attention(
    images: int, tokens: int, heads: int, width: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """width is D = H K here. Scores and sums over the tokens, and three projections of one token.

    Backward: the tokens read again and their gradient written; products as in `attention`.
    """
    mixing = 2.0 * images * tokens * heads * width
    projections = 3 * linear(images, width, width, itemsize).flops
    tokens_bytes = images * tokens * width * itemsize
    weights = 3 * width * width * itemsize
    if backward:
        return Cost(5 * mixing + 2 * projections, 2 * tokens_bytes + 2 * weights)
    return Cost(2 * mixing + projections, tokens_bytes + weights)


def quantize_rows(rows: int, width: int, itemsize: int) -> Cost:
    """x read; one byte an element and four a row written."""
    return Cost(0, rows * (width * (itemsize + 1) + 4))
