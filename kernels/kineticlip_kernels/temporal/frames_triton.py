"""Triton twin of `frame_attention`: one program per clip and head, forward and backward.

A program loads q, k and v of its head, [T, K] each, and has all scores at once: no running
maximum, no saved statistics, no second pass, no atomics. Letters: see ops.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.arithmetic_triton import PRECISION
from kineticlip_kernels.launch import FusedOp, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _load(ptr, frame, lane, stride_t, frames, K: tl.constexpr):
    inside = (frame < frames)[:, None] & (lane < K)[None, :]
    return tl.load(ptr + frame[:, None] * stride_t + lane[None, :], mask=inside, other=0.0)


@triton.jit
def _weights(q, k, frame, frames, scale):
    """softmax(scale * q k^T), fp32 [T, T]; zeros in columns behind the last frame."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where((frame < frames)[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _forward(
    qkv_ptr,  # [B, T, 3, H, K], strided
    out_ptr,  # [B, T, H, K]
    stride_b,
    stride_t,
    stride_part,
    stride_h,
    frames,
    heads,
    scale,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    clip, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    frame, lane = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    qkv_ptr += clip * stride_b + head * stride_h
    q = _load(qkv_ptr, frame, lane, stride_t, frames, K)
    k = _load(qkv_ptr + stride_part, frame, lane, stride_t, frames, K)
    v = _load(qkv_ptr + 2 * stride_part, frame, lane, stride_t, frames, K)
    weights = _weights(q, k, frame, frames, scale)
    out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    out_ptr += (clip * frames * heads + head) * K
    inside = (frame < frames)[:, None] & (lane < K)[None, :]
    place = frame[:, None] * (heads * K) + lane[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    qkv_ptr,  # [B, T, 3, H, K], strided
    grad_ptr,  # [B, T, H, K]
    grad_qkv_ptr,  # [B, T, 3, H, K]
    stride_b,
    stride_t,
    stride_part,
    stride_h,
    frames,
    heads,
    scale,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    clip, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    frame, lane = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    qkv_ptr += clip * stride_b + head * stride_h
    q = _load(qkv_ptr, frame, lane, stride_t, frames, K)
    k = _load(qkv_ptr + stride_part, frame, lane, stride_t, frames, K)
    weights = _weights(q, k, frame, frames, scale)
    grad_ptr += (clip * frames * heads + head) * K
    grad = _load(grad_ptr, frame, lane, heads * K, frames, K)
    inside = (frame < frames)[:, None] & (lane < K)[None, :]
    place = frame[:, None] * (3 * heads * K) + lane[None, :]
    target = grad_qkv_ptr + (clip * frames * 3 * heads + head) * K
    # Rows behind the last frame have weights, but their gradient is zero.
    part = tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=PRECISION)
    value = part.to(grad_qkv_ptr.dtype.element_ty)
    tl.store(target + 2 * heads * K + place, value, mask=inside)
    v = _load(qkv_ptr + 2 * stride_part, frame, lane, stride_t, frames, K)
    slope = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    slope = weights * (slope - tl.sum(weights * slope, axis=1)[:, None])
    slope = (slope * scale).to(q.dtype)
    part = tl.dot(slope, k, input_precision=PRECISION)
    tl.store(target + place, part.to(grad_qkv_ptr.dtype.element_ty), mask=inside)
    part = tl.dot(tl.trans(slope), q, input_precision=PRECISION)
    tl.store(target + heads * K + place, part.to(grad_qkv_ptr.dtype.element_ty), mask=inside)


def frame_attention_triton(qkv: Tensor) -> Tensor:
    """The Triton face of `frame_attention`."""
    (out,) = _frame_attention(qkv)
    return out


def _launch_forward(qkv: Tensor) -> Tensor:
    clips, frames, _, heads, width = qkv.shape
    qkv = launch.readable(qkv)
    out = launch.empty(clips, frames, heads, width, dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        _forward[(clips, heads)](
            qkv,
            out,
            *qkv.stride()[:4],
            frames,
            heads,
            width**-0.5,
            **_blocks("frame_attention", qkv),
        )
    return out


def _launch_backward(flags: list[bool], qkv: Tensor, grad: Tensor) -> list[Tensor]:
    clips, frames, _, heads, width = qkv.shape
    qkv = launch.readable(qkv)
    grad_qkv = launch.empty(*qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.numel():
        _backward[(clips, heads)](
            qkv,
            grad.contiguous(),
            grad_qkv,
            *qkv.stride()[:4],
            frames,
            heads,
            width**-0.5,
            **_blocks("frame_attention_backward", qkv),
        )
    return [grad_qkv]


def _blocks(kernel: str, qkv: Tensor) -> dict[str, int]:
    frames, width = qkv.shape[1], qkv.shape[4]
    return {
        "K": width,
        "BLOCK_T": max(power_of_two(frames), 16),
        "BLOCK_K": max(power_of_two(width), 16),
        **blocks(kernel, qkv.device, frames=frames, itemsize=qkv.itemsize),
    }


_frame_attention = FusedOp(
    "frame_attention",
    _launch_forward,
    _launch_backward,
    fake_forward=lambda qkv: qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:]),
    fake_backward=lambda flags, qkv, grad: [qkv.new_empty(qkv.shape)],
    save=lambda inputs, outputs: (inputs, ()),
    results=1,
    spread=(0,),
)
