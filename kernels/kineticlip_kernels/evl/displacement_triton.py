"""Triton twin of `displacement`: products with weights gathered row by row, never as [P, P, C].

For one query patch p the keys r use the weight rows off(p, r), each a contiguous run of C values
out of a table that stays in L2 (9 MB at 336 pixels). Channels are the first operand of every
product, so that few frames still meet Hopper's 64-row instruction. Letters: see ops.py; L = B * T
frames, and a pair (d, b, t) is direction d of frames t and t + 1, which adds to the frame that
looks: t + 1 in direction 0, t in direction 1.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.arithmetic_triton import PRECISION
from kineticlip_kernels.evl.displacement_backward_triton import launch_backward
from kineticlip_kernels.evl.offsets_triton import offset_of
from kineticlip_kernels.launch import FusedOp, ceil_div
from kineticlip_kernels.tuning import blocks


@triton.jit
def _sums(
    maps_ptr,  # [2, B, T - 1, P, P]
    previous_ptr,  # [O, C]
    next_ptr,  # [O, C]
    out_ptr,  # [B, T, P, C]
    clips,
    frames,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    patches: tl.constexpr = ROWS * COLUMNS
    query = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = tl.program_id(2) * BLOCK_L + tl.arange(0, BLOCK_L)
    frame = image % frames
    total = tl.zeros([BLOCK_C, BLOCK_L], dtype=tl.float32)
    for direction in tl.static_range(2):
        if direction == 0:
            weight_ptr, pair = previous_ptr, image // frames * (frames - 1) + frame - 1
            exists = (image < clips * frames) & (frame > 0)
        else:
            weight_ptr, pair = next_ptr, (clips + image // frames) * (frames - 1) + frame
            exists = (image < clips * frames) & (frame < frames - 1)
        line = maps_ptr + (pair.to(tl.int64) * patches + query) * patches  # [BLOCK_L]
        for start in range(0, patches, BLOCK_R):
            key = start + tl.arange(0, BLOCK_R)
            row = offset_of(query, key, ROWS, COLUMNS)
            inside = (channel < C)[:, None] & (key < patches)[None, :]
            place = row[None, :] * C + channel[:, None]
            weight = tl.load(weight_ptr + place, mask=inside, other=0.0)  # [BLOCK_C, BLOCK_R]
            inside = (key < patches)[:, None] & exists[None, :]
            part = tl.load(line[None, :] + key[:, None], mask=inside, other=0.0)
            total = tl.dot(weight, part.to(weight.dtype), total, input_precision=PRECISION)
    place = (image.to(tl.int64) * patches + query)[None, :] * C + channel[:, None]
    inside = (channel < C)[:, None] & (image < clips * frames)[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


def displacement_triton(
    maps: Tensor, previous_weight: Tensor, next_weight: Tensor, *, grid: tuple[int, int]
) -> Tensor:
    """The Triton face of `displacement`."""
    (out,) = _displacement(maps, previous_weight, next_weight, *grid)
    return out


def _forward(maps: Tensor, previous: Tensor, following: Tensor, rows: int, columns: int) -> Tensor:
    clips, frames, patches = maps.shape[1], maps.shape[2] + 1, maps.shape[3]
    width, images = previous.shape[1], clips * frames
    out = launch.empty(clips, frames, patches, width, dtype=previous.dtype, device=previous.device)
    if out.numel() == 0:
        return out
    block = blocks("displacement", maps.device, images=images, itemsize=previous.itemsize)
    programs = (patches, ceil_div(width, block["BLOCK_C"]), ceil_div(images, block["BLOCK_L"]))
    _sums[programs](
        maps.contiguous(),
        previous.contiguous(),
        following.contiguous(),
        out,
        clips,
        frames,
        C=width,
        ROWS=rows,
        COLUMNS=columns,
        **block,
    )
    return out


def _fake_backward(
    flags: list[bool], maps: Tensor, previous: Tensor, following: Tensor, *rest: object
) -> list[Tensor]:
    weight = previous.shape if any(flags[1:3]) else (0,)
    return [
        maps.new_empty(maps.shape if flags[0] else 0),
        previous.new_empty(weight),
        previous.new_empty(weight),
    ]


_displacement = FusedOp(
    "displacement",
    _forward,
    launch_backward,
    fake_forward=lambda maps, previous, following, rows, columns: previous.new_empty(
        maps.shape[1], maps.shape[2] + 1, maps.shape[3], previous.shape[1]
    ),
    fake_backward=_fake_backward,
    save=lambda inputs, outputs: (inputs[:3], inputs[3:]),
    results=1,
    spread=(0, 1, 2),
)
