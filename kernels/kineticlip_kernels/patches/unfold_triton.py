"""The patch matrix in Triton; exact. Letters: see ops.py."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.launch import Operator, ceil_div
from kineticlip_kernels.patches.embedding import patch_columns
from kineticlip_kernels.tuning import blocks


@triton.jit
def _unfold(
    pixels_ptr,  # uint8 [M, 3, height, width], strided
    out_ptr,  # [M, grid_rows * grid_columns, COLUMNS]
    stride_m,
    stride_c,
    stride_h,
    stride_w,
    total,
    grid_rows,
    grid_columns,
    PATCH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    patch_row = (row // grid_columns) % grid_rows
    image = (row // (grid_columns * grid_rows)).to(tl.int64)
    corner = image * stride_m + patch_row * PATCH * stride_h
    corner += (row % grid_columns) * PATCH * stride_w
    channel = column // (PATCH * PATCH)
    offset = channel * stride_c + (column // PATCH) % PATCH * stride_h + column % PATCH * stride_w
    mask = (row < total)[:, None] & (column < 3 * PATCH * PATCH)[None, :]
    byte = tl.load(pixels_ptr + corner[:, None] + offset[None, :], mask=mask, other=128)
    value = byte.to(tl.float32) - 128.0
    target = out_ptr + row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    mask = (row < total)[:, None] & (column < COLUMNS)[None, :]
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask)


def unfold_patches_triton(
    pixels: Tensor, patch: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`unfold_patches` on the GPU; exact."""
    return cast("Tensor", _unfold_patches_op(pixels, patch, dtype))


def _unfold_patches(pixels: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    shape = _matrix_shape(pixels, patch)
    out = launch.empty(*shape, dtype=dtype, device=pixels.device)
    rows, columns = shape[0] * shape[1], shape[2]
    if rows == 0:
        return out
    pixels = pixels if launch.near(pixels) else pixels.contiguous()
    block = blocks("unfold_patches", pixels.device)
    steps = ceil_div(rows, block["BLOCK_ROWS"])
    _unfold[(steps, ceil_div(columns, block["BLOCK_COLUMNS"]))](
        pixels,
        out,
        *pixels.stride(),
        rows,
        pixels.shape[2] // patch,
        pixels.shape[3] // patch,
        PATCH=patch,
        COLUMNS=columns,
        **block,
    )
    return out


def _matrix_shape(pixels: Tensor, patch: int) -> tuple[int, int, int]:
    count = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
    return pixels.shape[0], count, patch_columns(patch)


_unfold_patches_op = Operator(
    "unfold_patches",
    _unfold_patches,
    fake=lambda pixels, patch, dtype: pixels.new_empty(_matrix_shape(pixels, patch), dtype=dtype),
)
