"""LayerNorm forward in Triton, with and without the residual addition: one pass over memory.

Shape letters: R rows (all leading axes), D width. A program holds whole rows, in fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.arithmetic_triton import row_scale
from kineticlip_kernels.launch import ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _forward(
    x_ptr,  # [R, D], rows x_stride apart
    update_ptr,  # [R, D], or None
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    total_ptr,  # [R, D], or None
    y_ptr,  # [R, D]; e4m3 where there is a scale
    scale_ptr,  # fp32 [R], what y was divided by; or None
    mean_ptr,  # fp32 [R]
    rstd_ptr,  # fp32 [R]
    x_stride,
    update_stride,
    rows,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    place = row.to(tl.int64)[:, None] * x_stride + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out = row.to(tl.int64)[:, None] * D + column[None, :]
    if update_ptr is not None:
        place = row.to(tl.int64)[:, None] * update_stride + column[None, :]
        x += tl.load(update_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out, total, mask=inside)
        x = total.to(tl.float32)  # statistics of the sum as it is stored
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rest = tl.sum(centred, axis=1) / D  # what rounding left in the mean: it matters at mean 1000
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D - rest * rest + eps)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    y = (centred - rest[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    if scale_ptr is not None:
        scale = row_scale(tl.max(tl.where(inside, tl.abs(y), 0.0), axis=1))
        tl.store(scale_ptr + row, scale, mask=row < rows)
        y = y / scale[:, None]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean + rest, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


def launch_forward(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    y: Tensor,
    scale: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Fills y (e4m3 and a scale a row where one is given) -> (total or None, mean, rstd)."""
    width = x.shape[-1]
    flat = launch.rows_of(x)
    rows = len(flat)
    extra = None if update is None else launch.rows_of(update)
    total = None if extra is None else launch.empty(*x.shape, dtype=x.dtype, device=x.device)
    mean = launch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = launch.empty(rows, dtype=torch.float32, device=x.device)
    if flat.numel():
        block = blocks("layer_norm_forward", x.device, row_bytes=width * x.element_size())
        _forward[(ceil_div(rows, block["BLOCK_ROWS"]),)](
            flat,
            extra,
            weight.contiguous(),
            bias.contiguous(),
            total,
            y,
            scale,
            mean,
            rstd,
            flat.stride(0),
            0 if extra is None else extra.stride(0),
            rows,
            eps,
            D=width,
            BLOCK_D=power_of_two(width),
            **block,
        )
    return total, mean, rstd
