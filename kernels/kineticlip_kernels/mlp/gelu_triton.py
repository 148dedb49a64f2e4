"""QuickGELU in Triton, behind a bias or alone.

Shape letters: R rows (all leading axes), F width.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.dispatch import interpreting
from kineticlip_kernels.launch import FusedOp, ceil_div
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


def bias_quick_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
    """The Triton face of `bias_quick_gelu`."""
    (y,) = _bias_quick_gelu(x, bias)
    return y


def bias_forward(x: Tensor, bias: Tensor | None) -> Tensor:
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
    grad_x, grad_bias = launch_backward(x, bias, grad_y, flags[1])
    return [grad_x, grad_bias.to(bias.dtype)]


def launch_backward(
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


_bias_quick_gelu = FusedOp(
    "bias_quick_gelu",
    bias_forward,
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
