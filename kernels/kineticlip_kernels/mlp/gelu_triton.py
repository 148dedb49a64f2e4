"""QuickGELU in Triton: behind a bias, and in the epilogue of the linear layer before it.

Shape letters: R rows (all leading axes), D width in, F width out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.dispatch import interpreting
from kineticlip_kernels.gemm_triton import multiply, tile_of
from kineticlip_kernels.launch import FusedOp, ceil_div
from kineticlip_kernels.recompute import remember
from kineticlip_kernels.tuning import blocks

INTERPRET = tl.constexpr(interpreting())


@triton.jit
def gate(x, NARROW: tl.constexpr):
    """sigmoid(1.702 x), x in fp32; NARROW: the result is bound for bf16 or fewer bits."""
    if NARROW and not INTERPRET:
        # One special-function instruction an element instead of two (sm_90 SASS: 63 instructions
        # for 8 elements instead of 136); its relative error is 2^-11, half a bf16 unit at most,
        # and four fp16 units.
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;",
            "=f,f",
            [0.851 * x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return 0.5 * half + 0.5
    else:
        return tl.sigmoid(1.702 * x)


@triton.jit
def _activate(
    x_ptr,  # [R, F], rows x_stride apart
    bias_ptr,  # [F] or None
    y_ptr,  # [R, F]
    x_stride,
    rows,
    F,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (row < rows)[:, None] & (column < F)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    h = x.to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    y = h * gate(h, y_ptr.dtype.element_ty == tl.bfloat16)
    out = row[:, None] * F + column[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward(
    x_ptr,  # [R, F], rows x_stride apart
    bias_ptr,  # [F], or None where x has it already
    grad_y_ptr,  # [R, F], rows grad_stride apart
    grad_x_ptr,  # [R, F]
    partial_ptr,  # fp32 [programs, F]: sums of grad_x over rows, or None
    x_stride,
    grad_stride,
    rows,
    F,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """dx = dy s (1 + 1.702 x (1 - s)), s = sigmoid(1.702 x)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros([BLOCK_F], dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)
    for start in range(program * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < F)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        place = row[:, None] * grad_stride + column[None, :]
        grad = tl.load(grad_y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        h = x.to(tl.float32)
        if bias_ptr is not None:
            h += bias[None, :]
        s = gate(h, grad_x_ptr.dtype.element_ty == tl.bfloat16)
        grad = grad * s * (1.0 + 1.702 * h * (1.0 - s))
        out = row[:, None] * F + column[None, :]
        tl.store(grad_x_ptr + out, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if partial_ptr is not None:
            total += tl.sum(grad, axis=0)
    if partial_ptr is not None:
        tl.store(partial_ptr + program * F + column, total, mask=column < F)


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


def bias_quick_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
    """The Triton face of `bias_quick_gelu`."""
    (y,) = _bias_quick_gelu(x, bias)
    return y


def linear_quick_gelu_triton(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The Triton face of `linear_quick_gelu`; its backward needs the linear layer's output only."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    y, hidden = _linear_quick_gelu.outputs(x, weight, bias, keep)
    return remember(y, _activated, hidden)


def _activated(hidden: Tensor) -> Tensor:
    return _bias_forward(hidden, None)


def _bias_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    flat = launch.rows_of(x)
    y = launch.empty(*x.shape, dtype=x.dtype, device=x.device)
    rows, width = flat.shape
    if rows:
        block = blocks("bias_quick_gelu_forward", x.device, width=width)
        grid = (ceil_div(rows, block["BLOCK_ROWS"]), ceil_div(width, block["BLOCK_F"]))
        bias = None if bias is None else bias.contiguous()
        _activate[grid](flat, bias, y, flat.stride(0), rows, width, **block)
    return y


def _bias_backward(flags: list[bool], x: Tensor, bias: Tensor, grad_y: Tensor) -> list[Tensor]:
    grad_x, grad_bias = _launch_backward(x, bias, grad_y, flags[1])
    return [grad_x, grad_bias.to(bias.dtype)]


def _launch_backward(
    x: Tensor, bias: Tensor | None, grad_y: Tensor, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """-> (gradient of x, its fp32 sum over rows; empty unless wanted)."""
    flat, grad = launch.rows_of(x), launch.rows_of(grad_y)
    rows, width = flat.shape
    grad_x = launch.empty(*x.shape, dtype=x.dtype, device=x.device)
    if not rows:
        return grad_x, x.new_zeros(width if want_bias else 0, dtype=torch.float32)
    block = dict(blocks("bias_quick_gelu_backward", x.device, width=width))
    programs = min(ceil_div(rows, block["BLOCK_ROWS"]), block.pop("PROGRAMS"))
    partial = None
    if want_bias:
        partial = launch.empty(programs, width, dtype=torch.float32, device=x.device)
    _activate_backward[(programs, ceil_div(width, block["BLOCK_F"]))](
        flat,
        None if bias is None else bias.contiguous(),
        grad,
        grad_x,
        partial,
        flat.stride(0),
        grad.stride(0),
        rows,
        width,
        **block,
    )
    return grad_x, flat.new_empty(0) if partial is None else partial.sum(dim=0)


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
    grad_hidden, grad_bias = _launch_backward(hidden, None, grad_y, flags[2])
    flat = launch.rows_of(grad_hidden)  # [R, F]
    grad_x = (flat @ weight).view(x.shape) if flags[0] else x.new_empty(0)
    grad_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if flags[1] else x.new_empty(0)
    return [grad_x, grad_weight, grad_bias.to(x.dtype)]


_bias_quick_gelu = FusedOp(
    "bias_quick_gelu",
    _bias_forward,
    _bias_backward,
    fake_forward=lambda x, bias: x.new_empty(x.shape),
    fake_backward=lambda flags, x, bias, grad_y: [
        x.new_empty(x.shape),
        bias.new_empty(bias.shape if flags[1] else 0),
    ],
    save=lambda inputs, outputs: (inputs, ()),
    results=1,
    spread=(0, 1),
)

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
