"""The backward pass of `displacement` in Triton. Letters and pairs: see displacement_triton.py."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.arithmetic_triton import PRECISION
from kineticlip_kernels.evl.offsets_triton import offset_of
from kineticlip_kernels.launch import ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _grad_maps(
    previous_ptr,  # [O, C]
    next_ptr,  # [O, C]
    grad_ptr,  # [B, T, P, C]
    grad_maps_ptr,  # [2, B, T - 1, P, P]
    clips,
    frames,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of map [p, r] is the dot product of out's gradient at p with off(p, r)."""
    patches: tl.constexpr = ROWS * COLUMNS
    query = tl.program_id(0)
    key = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    pair = tl.program_id(2) * BLOCK_L + tl.arange(0, BLOCK_L)  # of one direction
    pairs = clips * (frames - 1)
    row = offset_of(query, key, ROWS, COLUMNS)
    for direction in tl.static_range(2):
        weight_ptr = previous_ptr if direction == 0 else next_ptr
        image = pair // (frames - 1) * frames + pair % (frames - 1) + (1 - direction)
        line = grad_ptr + (image.to(tl.int64) * patches + query) * C  # [BLOCK_L]
        total = tl.zeros([BLOCK_R, BLOCK_L], dtype=tl.float32)
        for start in range(0, C, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            inside = (key < patches)[:, None] & (channel < C)[None, :]
            place = row[:, None] * C + channel[None, :]
            weight = tl.load(weight_ptr + place, mask=inside, other=0.0)  # [BLOCK_R, BLOCK_C]
            inside = (channel < C)[:, None] & (pair < pairs)[None, :]
            grad = tl.load(line[None, :] + channel[:, None], mask=inside, other=0.0)
            total = tl.dot(weight, grad.to(weight.dtype), total, input_precision=PRECISION)
        target = (
            grad_maps_ptr + ((direction * pairs + pair).to(tl.int64) * patches + query) * patches
        )
        stored = (key < patches)[:, None] & (pair < pairs)[None, :]
        value = total.to(grad_maps_ptr.dtype.element_ty)
        tl.store(target[None, :] + key[:, None], value, mask=stored)


@triton.jit
def _grad_weights(
    maps_ptr,  # [2, B, T - 1, P, P]
    grad_ptr,  # [B, T, P, C]
    previous_ptr,  # [O, C], written in direction 0
    next_ptr,  # [O, C], written in direction 1
    clips,
    frames,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """All offsets of one vertical part, [BLOCK_C, 2 w - 1], summed over the rows that have it.

    Query column x of a pair meets offset column o at key column x + w - 1 - o.
    """
    patches: tl.constexpr = ROWS * COLUMNS
    width: tl.constexpr = 2 * COLUMNS - 1
    vertical = tl.program_id(0) - (ROWS - 1)  # query row - key row
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    direction = tl.program_id(2)
    pairs = clips * (frames - 1)
    column = tl.arange(0, BLOCK_X)
    total = tl.zeros([BLOCK_C, BLOCK_X], dtype=tl.float32)
    first, last = tl.maximum(vertical, 0), tl.minimum(ROWS + vertical, ROWS)
    steps = tl.cdiv(pairs * COLUMNS, BLOCK_L)
    for step in range(first * steps, last * steps):
        y = step // steps
        item = (step % steps) * BLOCK_L + tl.arange(0, BLOCK_L)
        pair, x = item // COLUMNS, item % COLUMNS
        inside = pair < pairs
        query = y * COLUMNS + x
        key = x[:, None] + COLUMNS - 1 - column[None, :]
        line = ((direction * pairs + pair).to(tl.int64) * patches + query) * patches
        line += (y - vertical) * COLUMNS
        met = inside[:, None] & (key >= 0) & (key < COLUMNS)
        part = tl.load(maps_ptr + line[:, None] + key, mask=met, other=0.0)  # [BLOCK_L, BLOCK_X]
        image = pair // (frames - 1) * frames + pair % (frames - 1) + (1 - direction)
        place = (image.to(tl.int64) * patches + query)[None, :] * C + channel[:, None]
        mask = (channel < C)[:, None] & inside[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0)  # [BLOCK_C, BLOCK_L]
        total = tl.dot(grad, part.to(grad.dtype), total, input_precision=PRECISION)
    place = (tl.program_id(0) * width + column)[None, :] * C + channel[:, None]
    inside = (channel < C)[:, None] & (column < width)[None, :]
    value = total.to(previous_ptr.dtype.element_ty)
    if direction == 0:
        tl.store(previous_ptr + place, value, mask=inside)
    else:
        tl.store(next_ptr + place, value, mask=inside)


def launch_backward(
    flags: list[bool],
    maps: Tensor,
    previous: Tensor,
    following: Tensor,
    grad: Tensor,
    rows: int,
    columns: int,
) -> list[Tensor]:
    clips, frames, patches = maps.shape[1], maps.shape[2] + 1, maps.shape[3]
    width, bins = previous.shape[1], len(previous)
    maps, grad, pairs = maps.contiguous(), grad.contiguous(), clips * (frames - 1)
    shape = {"C": width, "ROWS": rows, "COLUMNS": columns}
    grad_maps = maps.new_empty(0)
    if flags[0]:
        grad_maps = launch.empty(*maps.shape, dtype=maps.dtype, device=maps.device)
        if maps.numel():
            block = blocks(
                "displacement_maps", maps.device, images=pairs, itemsize=previous.itemsize
            )
            keys, images = ceil_div(patches, block["BLOCK_R"]), ceil_div(pairs, block["BLOCK_L"])
            _grad_maps[(patches, keys, images)](
                previous.contiguous(),
                following.contiguous(),
                grad,
                grad_maps,
                clips,
                frames,
                **shape,
                **block,
            )
    if not any(flags[1:3]):
        return [grad_maps, previous.new_empty(0), previous.new_empty(0)]
    grad_previous, grad_next = (
        launch.empty(bins, width, dtype=previous.dtype, device=previous.device) for _ in range(2)
    )
    if width:
        block = blocks("displacement_weights", maps.device, itemsize=previous.itemsize)
        _grad_weights[(2 * rows - 1, ceil_div(width, block["BLOCK_C"]), 2)](
            maps,
            grad,
            grad_previous,
            grad_next,
            clips,
            frames,
            BLOCK_X=max(power_of_two(2 * columns - 1), 16),
            **shape,
            **block,
        )
    return [grad_maps, grad_previous, grad_next]
