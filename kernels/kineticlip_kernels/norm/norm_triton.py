"""LayerNorm in Triton, with and without the residual addition: one pass over memory each way.

Shape letters: R rows (all leading axes), D width. A program holds whole rows, in fp32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.launch import FusedOp, ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks

E4M3_MAX = tl.constexpr(448.0)


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
        scale = tl.max(tl.where(inside, tl.abs(y), 0.0), axis=1) / E4M3_MAX
        scale = tl.where(scale > 0, scale, 1.0)
        tl.store(scale_ptr + row, scale, mask=row < rows)
        y = y / scale[:, None]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean + rest, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


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


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The Triton face of `layer_norm`."""
    (y,) = _layer_norm(x, weight, bias, eps)
    return y


def add_layer_norm_triton(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The Triton face of `add_layer_norm`."""
    total, y = _add_layer_norm(residual, update, weight, bias, eps)
    # Parameters alone give y a gradient, never the stream.
    return (total if residual.requires_grad or update.requires_grad else total.detach()), y


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


def _launch_backward(
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


def _layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = launch.empty(*x.shape, dtype=x.dtype, device=x.device)
    _, mean, rstd = launch_forward(x, None, weight, bias, eps, y=y)
    return y, mean, rstd


def _layer_norm_backward(
    flags: list[bool], x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, grad_y: Tensor
) -> list[Tensor]:
    return list(_launch_backward(x, weight, mean, rstd, None, grad_y, any(flags[1:])))


def _add_layer_norm_forward(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = launch.empty(*residual.shape, dtype=residual.dtype, device=residual.device)
    total, mean, rstd = launch_forward(residual, update, weight, bias, eps, y=y)
    assert total is not None
    return total, y, mean, rstd


def _add_layer_norm_backward(
    flags: list[bool],
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_total: Tensor | None,
    grad_y: Tensor | None,
) -> list[Tensor]:
    if grad_y is None:  # only the stream went on
        assert grad_total is not None
        stream = grad_total.clone(memory_format=torch.contiguous_format)
        return [stream, weight.new_empty(0), weight.new_empty(0)]
    return list(_launch_backward(total, weight, mean, rstd, grad_total, grad_y, any(flags[2:])))


def _fake_statistics(x: Tensor) -> Tensor:
    # math.prod, not numel, which would be a number of its own for every batch size.
    return x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


def _fake_gradients(x: Tensor, weight: Tensor, parameters: bool) -> list[Tensor]:
    like = [weight.new_empty(weight.shape if parameters else 0) for _ in range(2)]
    return [x.new_empty(x.shape), *like]


_layer_norm = FusedOp(
    "layer_norm",
    _layer_norm_forward,
    _layer_norm_backward,
    fake_forward=lambda x, weight, bias, eps: (
        x.new_empty(x.shape),
        _fake_statistics(x),
        _fake_statistics(x),
    ),
    fake_backward=lambda flags, x, weight, mean, rstd, grad_y: _fake_gradients(
        x, weight, any(flags[1:])
    ),
    save=lambda inputs, outputs: ((*inputs[:2], *outputs[1:]), ()),
    results=1,
    spread=(0, 1, 2),  # x, weight, bias
)

_add_layer_norm = FusedOp(
    "add_layer_norm",
    _add_layer_norm_forward,
    _add_layer_norm_backward,
    fake_forward=lambda residual, update, weight, bias, eps: (
        residual.new_empty(residual.shape),
        residual.new_empty(residual.shape),
        _fake_statistics(residual),
        _fake_statistics(residual),
    ),
    fake_backward=lambda flags, total, weight, mean, rstd, grad_total, grad_y: _fake_gradients(
        total, weight, grad_y is not None and any(flags[2:])
    ),
    save=lambda inputs, outputs: ((outputs[0], inputs[2], *outputs[2:]), ()),
    results=2,
    spread=(0, 0, 1, 2),  # residual and update have one gradient
)
