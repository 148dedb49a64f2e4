"""Pillow's two passes in its own integers, in Triton. Letters: see ops.py.

The resampler is two kernels. The first makes every needed column of every needed row, mirrored or
not, from the frames as they lie; the second makes the rows of each crop. What a crop shows is in
the two tables alone: where it leaves the frame its coefficients are zero.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.launch import Operator, ceil_div
from kineticlip_kernels.patches.resample import PRECISION, Crop, Resample, rows_first
from kineticlip_kernels.patches.windows import windows
from kineticlip_kernels.tuning import blocks

SHIFT = tl.constexpr(PRECISION)
HALF = tl.constexpr(1 << (PRECISION - 1))  # rounds the shift to nearest


@triton.jit
def _cut_columns(
    frames_ptr,  # uint8 [U, H, W, 3], strided
    first_ptr,  # int32 [X, S], leftmost source column of each output column
    weights_ptr,  # int32 [X, taps, S]
    out_ptr,  # uint8 [U, X, 3, rows, S]
    stride_u,
    stride_h,
    stride_w,
    stride_c,
    row_start,
    rows,
    width,
    side,
    taps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Byte loads: the taps of an output begin at any byte, those of its neighbour elsewhere.

    The sm_90 code issues 4 loads a tap for an output pixel (3 bytes and a weight). For 32 frames
    of 720p, three crops of 336 and 10 taps that is 29 million loads of a warp: 0.13 ms of an
    H200's load units (one a clock on 132 SMs at 1.75 GHz) where its 158 MB would take 0.04 ms,
    and the trunk behind it takes 15. Computed, not yet measured.
    """
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    variant = tl.program_id(2)
    inside = (row < rows)[:, None] & (column < side)[None, :]
    left = tl.load(first_ptr + variant * side + column, mask=column < side, other=0)
    source = frames_ptr + frame * stride_u + (row_start + row)[:, None] * stride_h
    half = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), HALF, tl.int32)
    red, green, blue = half, half, half
    for tap in range(taps):
        weight = tl.load(
            weights_ptr + (variant * taps + tap) * side + column, mask=column < side, other=0
        )[None, :]
        place = source + (left + tap)[None, :] * stride_w
        mask = inside & (left + tap < width)[None, :]
        red += tl.load(place, mask=mask, other=0).to(tl.int32) * weight
        green += tl.load(place + stride_c, mask=mask, other=0).to(tl.int32) * weight
        blue += tl.load(place + 2 * stride_c, mask=mask, other=0).to(tl.int32) * weight
    plane = rows * side
    # The minimum hides that columns are neighbours. Otherwise the compiler widens the stores, and
    # each byte loaded passes through shared memory: 2.5 times the instructions in the loop.
    target = out_ptr + (frame * tl.num_programs(2) + variant) * 3 * plane
    target += row[:, None] * side + tl.minimum(column, side - 1)[None, :]
    tl.store(target, _to_byte(red), mask=inside)
    tl.store(target + plane, _to_byte(green), mask=inside)
    tl.store(target + 2 * plane, _to_byte(blue), mask=inside)


@triton.jit
def _cut_rows(
    columns_ptr,  # uint8 [U, X, 3, rows, S], what _cut_columns wrote
    variants_ptr,  # int32 [V], the columns that each crop takes
    first_ptr,  # int32 [V, S], topmost source row of each output row
    weights_ptr,  # int32 [V, taps, S]
    out_ptr,  # uint8 [U, V, 3, S, S]
    variant_count,
    view_count,
    rows,
    side,
    taps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    image = tl.program_id(0) // 3  # u * V + v
    channel = tl.program_id(0) % 3
    view = image % view_count
    variant = (image // view_count).to(tl.int64) * variant_count + tl.load(variants_ptr + view)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < side)[:, None] & (column < side)[None, :]
    top = tl.load(first_ptr + view * side + row, mask=row < side, other=0)
    source = columns_ptr + (variant * 3 + channel) * rows * side + column[None, :]
    total = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), HALF, tl.int32)
    for tap in range(taps):
        weight = tl.load(weights_ptr + (view * taps + tap) * side + row, mask=row < side, other=0)
        mask = inside & (top + tap < rows)[:, None]
        pixel = tl.load(source + (top + tap)[:, None] * side, mask=mask, other=0)
        total += pixel.to(tl.int32) * weight[:, None]
    target = out_ptr + tl.program_id(0).to(tl.int64) * side * side
    tl.store(target + row[:, None] * side + column[None, :], _to_byte(total), mask=inside)


@triton.jit
def _to_byte(total):
    return tl.minimum(tl.maximum(total >> SHIFT, 0), 255).to(tl.uint8)


def cut_crops_triton(
    frames: Tensor,
    crops: Sequence[Crop],
    *,
    width: int,
    height: int,
    side: int,
    resample: Resample = "bicubic",
) -> Tensor:
    """`cut_crops` on the GPU; to the byte the same."""
    if not rows_first(frames.shape[1:3], width, height):
        flat = [int(number) for crop in crops for number in crop]
        return cast("Tensor", _cut_crops_op(frames, flat, width, height, side, resample))
    # The kernels begin with the columns: they get the frames turned over their diagonal.
    flat = [number for x, y, _ in crops for number in (y, x, 0)]
    turned = frames.transpose(1, 2)
    views: Tensor = _cut_crops_op(turned, flat, height, width, side, resample)
    views = views.mT.contiguous()
    for view, (_, _, mirrored) in enumerate(crops):
        if mirrored:
            views[:, view] = views[:, view].flip(-1)
    return views


def _cut_crops(
    frames: Tensor, crops: Sequence[int], width: int, height: int, side: int, resample: str
) -> Tensor:
    boxes = tuple((x, y, bool(m)) for x, y, m in zip(*[iter(crops)] * 3, strict=True))
    shape = (len(frames), len(boxes), 3, side, side)
    out = launch.empty(*shape, dtype=torch.uint8, device=frames.device)
    if out.numel() == 0:
        return out
    frames = frames if launch.near(frames) else frames.contiguous()
    source = (frames.shape[2], frames.shape[1])
    tables = windows(
        source, (width, height), boxes, side, cast("Resample", resample), frames.device
    )
    variants = len(tables.columns_first)
    columns = launch.empty(
        len(frames), variants, 3, tables.rows, side, dtype=torch.uint8, device=frames.device
    )
    block = blocks("cut_columns", frames.device)
    steps = ceil_div(tables.rows, block["BLOCK_ROWS"])
    _cut_columns[(len(frames) * steps, ceil_div(side, block["BLOCK_COLUMNS"]), variants)](
        frames,
        tables.columns_first,
        tables.columns_weights,
        columns,
        *frames.stride(),
        tables.row_start,
        tables.rows,
        frames.shape[2],
        side,
        tables.columns_weights.shape[1],
        **block,
    )
    block = blocks("cut_rows", frames.device)
    steps = ceil_div(side, block["BLOCK_ROWS"])
    _cut_rows[(out.shape[:3].numel(), steps, ceil_div(side, block["BLOCK_COLUMNS"]))](
        columns,
        tables.variants,
        tables.rows_first,
        tables.rows_weights,
        out,
        variants,
        len(boxes),
        tables.rows,
        side,
        tables.rows_weights.shape[1],
        **block,
    )
    return out


_cut_crops_op = Operator(
    "cut_crops",
    _cut_crops,
    fake=lambda frames, crops, width, height, side, resample: frames.new_empty(
        frames.shape[0], len(crops) // 3, 3, side, side
    ),
)
