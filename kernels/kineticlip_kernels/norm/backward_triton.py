"""LayerNorm backward in Triton: one pass over memory, then the sums of the programs.

Letters: see forward_triton.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.launch import ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _backward(
    x_ptr,  # [R, D], what was normalised, rows x_stride apart
    weight_ptr,  # [D]
    mean_ptr,  # fp32 [R]
    rstd_ptr,  # fp32 [R]
    grad_y_ptr,  # [R, D], rows grad_y_stride apart
    grad_total_ptr,  # [R, D], or None
    grad_x_ptr,  # [R, D]
    partial_ptr,  # fp32 [2, programs, D]: weight and bias gradients, or None
    x_stride,
    grad_y_stride,
    grad_total_stride,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """dx = rstd (g - mean(g) - xhat mean(g xhat)) + d total, with g = dy * weight."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_D], dtype=tl.float32)
    grad_bias = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(program * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        place = row.to(tl.int64)[:, None] * x_stride + column[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        place = row.to(tl.int64)[:, None] * grad_y_stride + column[None, :]
        grad_y = tl.load(grad_y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normed = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        g = grad_y * weight[None, :]
        g_mean = tl.sum(g, axis=1) / D
        projection = tl.sum(g * normed, axis=1) / D
        grad_x = (g - g_mean[:, None] - normed * projection[:, None]) * rstd[:, None]
        if grad_total_ptr is not None:
            place = row.to(tl.int64)[:, None] * grad_total_stride + column[None, :]
            grad_x += tl.load(grad_total_ptr + place, mask=inside, other=0.0).to(tl.float32)
        out = row.to(tl.int64)[:, None] * D + column[None, :]
        tl.store(grad_x_ptr + out, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            grad_weight += tl.sum(grad_y * normed, axis=0)
            grad_bias += tl.sum(grad_y, axis=0)
    if partial_ptr is not None:
        place = program * D + column
        tl.store(partial_ptr + place, grad_weight, mask=column < D)
        tl.store(partial_ptr + programs * D + place, grad_bias, mask=column < D)


def launch_backward(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_total: Tensor | None,
    grad_y: Tensor,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (d x, d weight, d bias); the last two are empty unless `parameters`."""
    width = x.shape[-1]
    flat, grad = launch.rows_of(x), launch.rows_of(grad_y)
    extra = None if grad_total is None else launch.rows_of(grad_total)
    rows = len(flat)
    grad_x = launch.empty(*x.shape, dtype=x.dtype, device=x.device)
    if not flat.numel():
        nothing = weight.new_zeros(weight.shape if parameters else 0)
        return grad_x, nothing, nothing.clone()
    block = dict(blocks("layer_norm_backward", x.device, row_bytes=width * x.element_size()))
    programs = min(ceil_div(rows, block["BLOCK_ROWS"]), block.pop("PROGRAMS"))
    partial = None
    if parameters:
        partial = launch.empty(2, programs, width, dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        flat,
        weight.contiguous(),
        mean,
        rstd,
        grad,
        extra,
        grad_x,
        partial,
        flat.stride(0),
        grad.stride(0),
        0 if extra is None else extra.stride(0),
        rows,
        D=width,
        BLOCK_D=power_of_two(width),
        **block,
    )
    if partial is None:
        return grad_x, weight.new_empty(0), weight.new_empty(0)
    return grad_x, partial[0].sum(dim=0).to(weight.dtype), partial[1].sum(dim=0).to(weight.dtype)
