"""QuickGELU in the epilogue of the linear layer before it, in Triton.

Shape letters: R rows (all leading axes), D width in, F width out.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.gemm_triton import multiply, tile_of
from kineticlip_kernels.launch import FusedOp, ceil_div
from kineticlip_kernels.mlp.gelu_triton import bias_forward, gate, launch_backward
from kineticlip_kernels.recompute import remember
from kineticlip_kernels.tuning import blocks


@triton.jit
def _linear(
    x_ptr,  # [R, D], rows x_stride apart
    weight_ptr,  # [F, D]
    bias_ptr,  # [F]
    y_ptr,  # [R, F]
    hidden_ptr,  # [R, F], the linear layer's own output; or None
    x_stride,
    rows,
    F,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row, column = tile_of(tl.program_id(0), rows, F, BLOCK_M, BLOCK_N, GROUP_M)
    total = multiply(x_ptr, weight_ptr, row, column, x_stride, rows, F, D, BLOCK_K)
    bias = tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
    # Rounded as the linear layer's own output: the backward finds the same h, kept or not.
    h = (total + bias[None, :]).to(y_ptr.dtype.element_ty).to(tl.float32)
    inside = (row < rows)[:, None] & (column < F)[None, :]
    out = row.to(tl.int64)[:, None] * F + column[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + out, h.to(hidden_ptr.dtype.element_ty), mask=inside)
    y = h * gate(h, y_ptr.dtype.element_ty == tl.bfloat16)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)


def linear_quick_gelu_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The Triton face of `linear_quick_gelu`; its backward needs the linear layer's output only."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    y, hidden = _linear_quick_gelu.outputs(x, weight, bias, keep)
    return remember(y, _activated, hidden)


def _activated(hidden: Tensor) -> Tensor:
    return bias_forward(hidden, None)


def _linear_forward(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """-> (quick_gelu(h), h = x W^T + b; empty unless `keep`)."""
    flat = launch.rows_of(x)
    rows, width = len(flat), len(weight)
    y = launch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    hidden = launch.empty(*(y.shape if keep else (0,)), dtype=x.dtype, device=x.device)
    if rows:
        block = blocks("linear_quick_gelu", x.device, rows=rows, keep=int(keep))
        tiles = ceil_div(rows, block["BLOCK_M"]) * ceil_div(width, block["BLOCK_N"])
        _linear[(tiles,)](
            flat,
            weight.contiguous(),
            bias.contiguous(),
            y,
            hidden if keep else None,
            flat.stride(0),
            rows,
            width,
            D=flat.shape[1],
            **block,
        )
    return y, hidden


def _linear_backward(
    flags: list[bool], x: Tensor, weight: Tensor, hidden: Tensor, grad_y: Tensor
) -> list[Tensor]:
    grad_hidden, grad_bias = launch_backward(hidden, None, grad_y, flags[2])
    flat = launch.rows_of(grad_hidden)  # [R, F]
    grad_x = (flat @ weight).view(x.shape) if flags[0] else x.new_empty(0)
    grad_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if flags[1] else x.new_empty(0)
    return [grad_x, grad_weight, grad_bias.to(x.dtype)]


_linear_quick_gelu = FusedOp(
    "linear_quick_gelu",
    _linear_forward,
    _linear_backward,
    fake_forward=lambda x, weight, bias, keep: (
        x.new_empty(*x.shape[:-1], len(weight)),
        x.new_empty((*x.shape[:-1], len(weight)) if keep else 0),
    ),
    fake_backward=lambda flags, x, weight, hidden, grad_y: [
        x.new_empty(x.shape if flags[0] else 0),
        weight.new_empty(weight.shape if flags[1] else 0),
        x.new_empty(len(weight) if flags[2] else 0),
    ],
    save=lambda inputs, outputs: ((*inputs[:2], outputs[1]), ()),
    results=1,
    spread=(0, 1, 2),
)
