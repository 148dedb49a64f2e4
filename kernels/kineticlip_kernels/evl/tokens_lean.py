"""The lean face of `attend_tokens`: passes over tokens that were never projected.

Letters: see ops.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kineticlip_kernels.dispatch import wide
from kineticlip_kernels.evl.lean import apply, narrow, without_autocast


def attend_tokens_lean(
    query: Tensor,
    tokens: Tensor,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    position: Tensor | None = None,
    motion: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The lean face of `attend_tokens`: keeps the normalised tokens and the weights."""
    return apply(_AttendTokens, query, tokens, conv_weight, conv_bias, position, motion, eps)


class _AttendTokens(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        query: Tensor,
        tokens: Tensor,
        conv_weight: Tensor | None,
        conv_bias: Tensor | None,
        position: Tensor | None,
        motion: Tensor | None,
        eps: float,
    ) -> Tensor:
        f = _sum_terms(tokens, conv_weight, conv_bias, position, motion)
        z, _, rstd = torch.native_layer_norm(f, f.shape[-1:], None, None, eps)
        z = z.flatten(1, 2)  # [B, T * N, C]
        weights = torch.bmm(query.to(z.dtype), z.mT)  # [B, Q, T * N]
        torch.softmax(weights, dim=-1, out=weights)
        mixed = torch.bmm(weights, z)  # [B, Q, C]
        kept = tokens if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(query, kept, conv_weight, z, rstd, weights)
        ctx.shape = tokens.shape
        ctx.dtypes = [
            None if term is None else term.dtype
            for term in (query, tokens, conv_weight, conv_bias, position, motion)
        ]
        return narrow(mixed, query.dtype)

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, tokens, conv_weight, z, rstd, weights = ctx.saved_tensors
        grad, query = grad.to(z.dtype), query.to(z.dtype)
        slope = torch.bmm(grad, z.mT).mul_(weights)  # [B, Q, T * N]
        slope.addcmul_(weights, slope.sum(dim=-1, keepdim=True), value=-1)
        grad_query = torch.bmm(slope, z)
        both = torch.cat([weights, slope], dim=1).mT  # [B, T * N, 2 Q]
        grad_z = torch.bmm(both, torch.cat([grad, query], dim=1))  # [B, T * N, C]
        grad_f = _layer_norm_backward(grad_z, z, rstd).view(ctx.shape)  # [B, T, N, C]
        need = ctx.needs_input_grad
        found = [
            grad_query,
            _conv_input_gradient(grad_f, conv_weight) if need[1] else None,
            _conv_weight_gradient(grad_f, tokens) if need[2] else None,
            grad_f.sum(dim=(0, 1, 2)) if need[3] else None,
            grad_f.sum(dim=(0, 2)) if need[4] else None,
            grad_f[:, :, 1:] if need[5] else None,
        ]
        narrowed = [
            None if part is None else part.to(dtype)
            for part, dtype in zip(found, ctx.dtypes, strict=True)
        ]
        return (*narrowed, None)


def _sum_terms(
    tokens: Tensor,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    position: Tensor | None,
    motion: Tensor | None,
) -> Tensor:
    """f in one new tensor [B, T, N, C] of fp32."""
    if conv_weight is None:
        f = wide(tokens).clone() if wide(tokens) is tokens else wide(tokens)
    else:
        before, centre, after = conv_weight.to(wide(tokens[:0]).dtype)[:, 0].unbind(1)  # [C] each
        f = tokens * (1 + centre)
        f[:, 1:].addcmul_(tokens[:, :-1], before)
        f[:, :-1].addcmul_(tokens[:, 1:], after)
    if conv_bias is not None:
        f += conv_bias if position is None else (wide(conv_bias) + wide(position))[:, None]
    elif position is not None:
        f += position[:, None]
    if motion is not None:
        f[:, :, 1:] += motion
    return f


def _layer_norm_backward(grad: Tensor, z: Tensor, rstd: Tensor) -> Tensor:
    """rstd (g - mean(g) - z mean(g z)), in the memory of the gradient."""
    projection = torch.linalg.vecdot(grad, z).unsqueeze(-1) / z.shape[-1]
    grad.sub_(grad.mean(dim=-1, keepdim=True)).addcmul_(z, projection, value=-1)
    return grad.mul_(rstd.view(*grad.shape[:2], 1))


def _conv_input_gradient(grad: Tensor, conv_weight: Tensor | None) -> Tensor:
    """Gradient of the tokens: the convolution runs backwards, plus the term that skips it."""
    if conv_weight is None:
        return grad
    before, centre, after = conv_weight.to(grad.dtype)[:, 0].unbind(1)
    found = grad * (1 + centre)
    found[:, :-1].addcmul_(grad[:, 1:], before)
    found[:, 1:].addcmul_(grad[:, :-1], after)
    return found


def _conv_weight_gradient(grad: Tensor, tokens: Tensor) -> Tensor:
    """[C, 1, 3]: products of gradient and neighbouring frames, one frame at a time."""
    frames, width = grad.shape[1], grad.shape[3]
    found = grad.new_zeros(3, width)
    for frame in range(frames):
        for tap in range(3):
            source = frame + tap - 1
            if 0 <= source < frames:
                found[tap] += (grad[:, frame] * tokens[:, source]).sum(dim=(0, 1))
    return found.mT.unsqueeze(1)
