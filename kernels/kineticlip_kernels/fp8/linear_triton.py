"""The linear layer on 8-bit operands in Triton: a GEMM with a scale a row of either.

Shape letters: R rows (all leading axes), D width in, F width out.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.fp8.format import Scaled
from kineticlip_kernels.gemm_triton import multiply, tile_of
from kineticlip_kernels.launch import Operator, ceil_div
from kineticlip_kernels.tuning import blocks


@triton.jit
def _linear(
    x_ptr,  # e4m3 [R, D]
    weight_ptr,  # e4m3 [F, D]
    x_scale_ptr,  # fp32 [R]
    weight_scale_ptr,  # fp32 [F]
    bias_ptr,  # [F] or None
    y_ptr,  # [R, F]
    rows,
    F,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row, column = tile_of(tl.program_id(0), rows, F, BLOCK_M, BLOCK_N, GROUP_M)
    total = multiply(x_ptr, weight_ptr, row, column, D, rows, F, D, BLOCK_K)
    x_scale = tl.load(x_scale_ptr + row, mask=row < rows, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + column, mask=column < F, other=0.0)
    y = total * x_scale[:, None] * weight_scale[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (column < F)[None, :]
    out = row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)


def linear_fp8_triton(
    x: Scaled, weight: Scaled, bias: Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The Triton face of `linear_fp8`."""
    y: Tensor = _linear_op(x.values, x.scale, weight.values, weight.scale, bias, dtype)
    return y


def _launch_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows, width = len(flat), len(weight)
    y = launch.empty(*x.shape[:-1], width, dtype=dtype, device=x.device)
    if rows:
        block = blocks("linear_fp8", x.device, rows=rows)
        tiles = ceil_div(rows, block["BLOCK_M"]) * ceil_div(width, block["BLOCK_N"])
        _linear[(tiles,)](
            flat,
            weight.contiguous(),
            x_scale.reshape(-1).contiguous(),
            weight_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            rows,
            width,
            D=flat.shape[1],
            **block,
        )
    return y


_linear_op = Operator(
    "linear_fp8",
    _launch_linear,
    fake=lambda x, x_scale, weight, weight_scale, bias, dtype: x.new_empty(
        *x.shape[:-1], len(weight), dtype=dtype
    ),
)
