"""Triton twin of ops.py: averages of embeddings and of scores. Classes: classes_triton.py.

Shape letters: B clips, T frames, N rows, V views, E embedding, C classes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.head.reference import EPS
from kineticlip_kernels.launch import FusedOp, Operator, ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _mean_forward(
    x_ptr,  # [B, T, E]
    y_ptr,  # [B, E]
    mean_ptr,  # fp32 [B, E]
    stride_b,
    stride_t,
    frames,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    clip = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], dtype=tl.float32)
    for start in range(0, frames, BLOCK_T):
        frame = start + tl.arange(0, BLOCK_T)
        inside = (frame < frames)[:, None] & (column < E)[None, :]
        place = clip * stride_b + frame[:, None] * stride_t + column[None, :]
        total += tl.sum(tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32), axis=0)
    mean = total / frames
    norm = tl.maximum(tl.sqrt(tl.sum(mean * mean, axis=0)), eps)
    place = clip * E + column
    tl.store(mean_ptr + place, mean, mask=column < E)
    tl.store(y_ptr + place, (mean / norm).to(y_ptr.dtype.element_ty), mask=column < E)


@triton.jit
def _mean_backward(
    mean_ptr,  # fp32 [B, E]
    grad_y_ptr,  # [B, E]
    grad_x_ptr,  # [B, T, E]
    stride_b,
    frames,
    eps,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dx = (g - y (y . g)) / |mean| / T; below eps the norm is a constant."""
    clip = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_E)
    mean = tl.load(mean_ptr + clip * E + column, mask=column < E, other=0.0)
    grad = tl.load(grad_y_ptr + clip * stride_b + column, mask=column < E, other=0.0)
    grad = grad.to(tl.float32)
    norm = tl.sqrt(tl.sum(mean * mean, axis=0))
    y = tl.where(norm > eps, mean / tl.maximum(norm, eps), 0.0)
    grad = (grad - y * tl.sum(y * grad, axis=0)) / (tl.maximum(norm, eps) * frames)
    frame = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (frame < frames)[:, None] & (column < E)[None, :]
    place = (clip * frames + frame)[:, None] * E + column[None, :]
    rows = tl.broadcast_to(grad[None, :], (BLOCK_T, BLOCK_E))
    tl.store(grad_x_ptr + place, rows.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mean_softmax(
    logits_ptr,  # [N, V, C]
    out_ptr,  # fp32 [N, C]
    stride_n,
    stride_v,
    views,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for view in range(views):
        place = logits_ptr + item * stride_n + view * stride_v + column
        logits = tl.load(place, mask=column < C, other=float("-inf")).to(tl.float32)
        weight = tl.exp(logits - tl.max(logits, axis=0))
        total += weight / tl.sum(weight, axis=0)
    tl.store(out_ptr + item * C + column, total / views, mask=column < C)


def mean_normalize_triton(x: Tensor) -> Tensor:
    """The Triton face of `mean_normalize`."""
    (y,) = _mean_normalize(x)
    return y


def mean_softmax_triton(logits: Tensor) -> Tensor:
    """The Triton face of `mean_softmax`."""
    out: Tensor = _mean_softmax_op(logits)
    return out


def _mean_normalize_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """-> (y [B, E], mean fp32 [B, E])."""
    clips, frames, width = x.shape
    x = launch.readable(x)
    y = launch.empty(clips, width, dtype=x.dtype, device=x.device)
    mean = launch.empty(clips, width, dtype=torch.float32, device=x.device)
    if y.numel():
        _mean_forward[(clips,)](
            x,
            y,
            mean,
            x.stride(0),
            x.stride(1),
            frames,
            EPS,
            E=width,
            BLOCK_E=power_of_two(width),
            **blocks("mean_normalize", x.device, width=width),
        )
    return y, mean


def _mean_normalize_backward(
    flags: list[bool], x: Tensor, mean: Tensor, grad_y: Tensor
) -> list[Tensor]:
    clips, frames, width = x.shape
    grad_x = launch.empty(*x.shape, dtype=x.dtype, device=x.device)
    if grad_x.numel():
        grad_y = launch.readable(grad_y)
        block = blocks("mean_normalize", x.device, width=width)
        _mean_backward[(clips, ceil_div(frames, block["BLOCK_T"]))](
            mean,
            grad_y,
            grad_x,
            grad_y.stride(0),
            frames,
            EPS,
            E=width,
            BLOCK_E=power_of_two(width),
            **block,
        )
    return [grad_x]


def _launch_mean_softmax(logits: Tensor) -> Tensor:
    """-> fp32 [N, C]."""
    items, views, count = logits.shape
    logits = launch.readable(logits)
    out = launch.empty(items, count, dtype=torch.float32, device=logits.device)
    if out.numel():
        _mean_softmax[(items,)](
            logits,
            out,
            logits.stride(0),
            logits.stride(1),
            views,
            C=count,
            BLOCK_C=power_of_two(count),
            **blocks("mean_softmax", logits.device, classes=count),
        )
    return out


_mean_normalize = FusedOp(
    "mean_normalize",
    _mean_normalize_forward,
    _mean_normalize_backward,
    fake_forward=lambda x: (
        x.new_empty(x.shape[0], x.shape[2]),
        x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32),
    ),
    fake_backward=lambda flags, x, mean, grad_y: [x.new_empty(x.shape)],
    save=lambda inputs, outputs: ((inputs[0], outputs[1]), ()),
    results=1,
    spread=(0,),
)

_mean_softmax_op = Operator(
    "mean_softmax",
    _launch_mean_softmax,
    fake=lambda logits: logits.new_empty(logits.shape[0], logits.shape[2], dtype=torch.float32),
)
