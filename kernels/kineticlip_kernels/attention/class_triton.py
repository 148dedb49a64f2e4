"""Attention of the class token alone in Triton: each token is read once and never projected.

Shape letters: M images, H heads, D width, n tokens of a set. Set 0 are the image's own tokens;
each other set has M' rows, shared by M / M' images. With the key projection moved into the query,
a token y gets the score q_h . y for head h, and the heads mix the tokens themselves.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.attention.reference import absorbed_query, project_values
from kineticlip_kernels.attention.sets_triton import LOG2_E, load_tile, store_tile
from kineticlip_kernels.attention.sources import MAX_SOURCES
from kineticlip_kernels.launch import FusedOp, power_of_two, readable
from kineticlip_kernels.tuning import blocks

LOG2 = tl.constexpr(LOG2_E)


@triton.jit
def _forward(
    query_ptr,  # [M, H, D], scaled
    sets,  # tuple of [M', n, D]
    strides,  # tuple of (row, token) strides
    lengths,  # tuple of n
    shares,  # tuple of M / M'
    mixed_ptr,  # [M, H, D]
    lse_ptr,  # fp32 [M, H]: log2 of the sum of 2^score
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    place = image * H * D
    query = load_tile(query_ptr + place, 0, H, D, D, BLOCK_D, BLOCK_H)  # [H, D]
    highest = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    # Tokens and columns are the long sides of both products, heads the short one.
    mixed = tl.zeros([BLOCK_D, BLOCK_H], dtype=tl.float32)
    for index in tl.static_range(len(sets)):
        row_stride, token_stride = strides[index]
        base = sets[index] + image // shares[index] * row_stride
        length = lengths[index]
        # What the compiler hoists out of this loop lives across all of them: up to 11 registers on
        # sm_90, where 128 are two blocks a multiprocessor, and a spill on sm_100 (Triton 3.8).
        for start in tl.range(0, length, BLOCK_N, disable_licm=True):
            y = load_tile(base, start, length, token_stride, D, BLOCK_D, BLOCK_N)  # [n, D]
            scores = tl.dot(y, query.T, input_precision="ieee") * LOG2  # [n, H]
            known = start + tl.arange(0, BLOCK_N) < length
            scores = tl.where(known[:, None], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, axis=0))
            weights = tl.exp2(scores - new_highest[None, :])
            shrink = tl.exp2(highest - new_highest)
            total = total * shrink + tl.sum(weights, axis=0)
            mixed = mixed * shrink[None, :]
            mixed = tl.dot(y.T, weights.to(y.dtype), mixed, input_precision="ieee")
            highest = new_highest
    store_tile(mixed_ptr + place, (mixed / total[None, :]).T, 0, H, D, D, BLOCK_D, BLOCK_H)
    head = tl.arange(0, BLOCK_H)
    tl.store(lse_ptr + image * H + head, highest + tl.log2(total), mask=head < H)


@triton.jit
def _backward(
    query_ptr,  # [M, H, D]
    sets,  # as in _forward
    strides,
    lengths,
    shares,
    grad_ptr,  # [M, H, D]: gradient of the mixed tokens
    lse_ptr,  # fp32 [M, H]
    delta_ptr,  # fp32 [M, H]: sum of mixed * grad over D
    grad_query_ptr,  # [M, H, D]
    pairs_ptr,  # [M, sum n, 2, H]: (ds, p) of every token
    H,
    tokens,  # sum n
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d query = ds^T y, over all sets, with ds = p (y . d mixed - delta)."""
    image = tl.program_id(0).to(tl.int64)
    place = image * H * D
    head = tl.arange(0, BLOCK_H)
    query = load_tile(query_ptr + place, 0, H, D, D, BLOCK_D, BLOCK_H)
    grad = load_tile(grad_ptr + place, 0, H, D, D, BLOCK_D, BLOCK_H)
    lse = tl.load(lse_ptr + image * H + head, mask=head < H, other=float("inf"))
    delta = tl.load(delta_ptr + image * H + head, mask=head < H, other=0.0)
    grad_query = tl.zeros([BLOCK_D, BLOCK_H], dtype=tl.float32)
    pairs_ptr += image * tokens * 2 * H
    for index in tl.static_range(len(sets)):
        row_stride, token_stride = strides[index]
        base = sets[index] + image // shares[index] * row_stride
        length = lengths[index]
        for start in range(0, length, BLOCK_N):
            y = load_tile(base, start, length, token_stride, D, BLOCK_D, BLOCK_N)
            scores = tl.dot(y, query.T, input_precision="ieee") * LOG2  # [n, H]
            # Tokens behind the end: see backward_queries_triton.py.
            known = (start + tl.arange(0, BLOCK_N) < length)[:, None]
            weights = tl.where(known, tl.exp2(scores - lse[None, :]), 0.0)
            grad_weights = tl.dot(y, grad.T, input_precision="ieee")
            grad_scores = weights * (grad_weights - delta[None, :])
            store_tile(pairs_ptr, grad_scores, start, length, 2 * H, H, BLOCK_H, BLOCK_N)
            store_tile(pairs_ptr + H, weights, start, length, 2 * H, H, BLOCK_H, BLOCK_N)
            grad_query = tl.dot(y.T, grad_scores.to(y.dtype), grad_query, input_precision="ieee")
        pairs_ptr += length * 2 * H
    store_tile(grad_query_ptr + place, grad_query.T, 0, H, D, D, BLOCK_D, BLOCK_H)


def class_attention_triton(
    x: Tensor, weight: Tensor, bias: Tensor, *, heads: int, sources: Sequence[Tensor] = ()
) -> Tensor:
    """The Triton face of `class_attention`, for at most MAX_SOURCES sources."""
    # Under autocast the projection comes out in its dtype, whatever the tokens have.
    query = absorbed_query(x, weight, bias, heads).to(x.dtype)  # [M, H, D]
    (mixed,) = _class_mix(query, x, *sources, *[None] * (MAX_SOURCES - len(sources)))
    return project_values(mixed, weight, bias, heads)


def _sets(tokens: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The sets there are, columns adjacent."""
    return tuple(readable(t) for t in tokens if t is not None)


def _set_arguments(images: int, sets: tuple[Tensor, ...]) -> tuple[tuple[object, ...], ...]:
    """(sets, strides, lengths, shares) of a launch."""
    lengths = tuple(t.shape[1] for t in sets)
    return sets, tuple(t.stride()[:2] for t in sets), lengths, tuple(images // len(t) for t in sets)


def _sizes(query: Tensor) -> dict[str, int]:
    width, heads = query.shape[2], query.shape[1]
    block_d, block_h = max(power_of_two(width), 16), max(power_of_two(heads), 16)
    return {"D": width, "BLOCK_D": block_d, "BLOCK_H": block_h}


def _class_mix_forward(
    query: Tensor,
    tokens: Tensor,
    s0: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    s3: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """-> (mixed [M, H, D], log2 sums [M, H])."""
    query = query.contiguous()
    images, heads, width = query.shape
    mixed = launch.empty(*query.shape, dtype=query.dtype, device=query.device)
    lse = launch.empty(images, heads, dtype=torch.float32, device=query.device)
    if images:
        sets = _set_arguments(images, _sets((tokens, s0, s1, s2, s3)))
        block = blocks("class_attention_forward", query.device, width=width)
        _forward[(images,)](query, *sets, mixed, lse, heads, **_sizes(query), **block)
    return mixed, lse


def _class_mix_backward(
    flags: list[bool],
    query: Tensor,
    tokens: Tensor,
    s0: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    s3: Tensor | None,
    mixed: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> list[Tensor]:
    """-> gradients of query and the five; empty where there is no tensor or no wish.

    Parameters as torch.library wants them, each tensor by itself.
    """
    query, grad = query.contiguous(), grad.contiguous()
    images, heads, width = query.shape
    given = (tokens, s0, s1, s2, s3)
    sets = _sets(given)
    grad_query = launch.empty(*query.shape, dtype=query.dtype, device=query.device)
    total = sum(t.shape[1] for t in sets)
    pairs = launch.empty(images, total, 2, heads, dtype=query.dtype, device=query.device)
    if images:
        block = blocks("class_attention_backward", query.device, width=width)
        delta = (mixed.float() * grad.float()).sum(dim=-1)  # [M, H]
        _backward[(images,)](
            query,
            *_set_arguments(images, sets),
            grad,
            lse,
            delta,
            grad_query,
            pairs,
            heads,
            total,
            **_sizes(query),
            **block,
        )
    found = [grad_query] + [query.new_empty(0) for _ in given]
    operand = torch.cat([query, grad], dim=1)  # [M, 2 H, D]
    parts = iter(pairs.flatten(2).split([t.shape[1] for t in sets], dim=1))  # [M, n, 2 H]
    for index, wanted in enumerate(given, start=1):
        if wanted is not None:
            part = next(parts)
            found[index] = (
                _token_gradient(part, operand, len(wanted)) if flags[index] else query.new_empty(0)
            )
    return found


def _token_gradient(pairs: Tensor, operand: Tensor, rows: int) -> Tensor:
    """dy = ds q + p d mixed, summed over the images of a row: one product of depth 2 H M / M'.

    pairs [M, n, 2 H], operand [M, 2 H, D] -> [M', n, D].
    """
    share = len(pairs) // max(rows, 1)
    left = pairs.unflatten(0, (rows, share)).transpose(1, 2).flatten(2)  # [M', n, share 2 H]
    grad: Tensor = left @ operand.unflatten(0, (rows, share)).flatten(1, 2)
    return grad


_class_mix = FusedOp(
    "class_mix",
    _class_mix_forward,
    _class_mix_backward,
    fake_forward=lambda query, *tokens: (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:2], dtype=torch.float32),
    ),
    fake_backward=lambda flags, query, *rest: [
        query.new_empty(query.shape),
        *(
            query.new_empty(0 if t is None or not flag else t.shape)
            for flag, t in zip(flags[1:], rest[: 1 + MAX_SOURCES], strict=True)
        ),
    ],
    save=lambda inputs, outputs: ((*inputs, *outputs), ()),
    results=1,
    spread=tuple(range(2 + MAX_SOURCES)),
)
