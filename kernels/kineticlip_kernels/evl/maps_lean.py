"""The lean face of `neighbour_maps`: one pair of frames at a time. Letters: see ops.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kineticlip_kernels.dispatch import wide
from kineticlip_kernels.evl.lean import apply, without_autocast


def neighbour_maps_lean(q: Tensor, k: Tensor) -> Tensor:
    """The lean face of `neighbour_maps`: one pair of frames at a time."""
    for _ in range(q.shape[0]):
        pass  # torch.compile takes the number of clips for a constant now: it unrolls the Function
    return apply(_NeighbourMaps, q, k)


class _NeighbourMaps(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        clips, frames, patches = q.shape[0], q.shape[1], q.shape[2] - 1
        maps = q.new_empty(2, clips, frames - 1, patches, patches)
        for clip, here, there, out in _neighbours(maps):
            scores = _scores(q[clip, here], k[clip, there])  # [H, P, P]
            torch.softmax(scores, dim=-1, out=scores)
            out.copy_(scores.mean(dim=0))
        return maps

    @staticmethod
    @without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        heads, scale = q.shape[3], q.shape[4] ** -0.5
        grad_q, grad_k = torch.zeros_like(wide(q)), torch.zeros_like(wide(k))
        for clip, here, there, upper in _neighbours(grad):
            weights = _scores(q[clip, here], k[clip, there]).softmax(dim=-1)  # [H, P, P]
            part = wide(upper) * (scale / heads)  # every head has the same part in the mean
            slope = part * weights
            slope -= weights * slope.sum(dim=-1, keepdim=True)
            grad_q[clip, here, 1:] += (slope @ _heads(k[clip, there])).transpose(0, 1)
            grad_k[clip, there, 1:] += (slope.mT @ _heads(q[clip, here])).transpose(0, 1)
        return grad_q.to(q.dtype), grad_k.to(k.dtype)


def _neighbours(maps: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """Every map [P, P] with its clip, the frame that looks and the frame it looks at."""
    for clip in range(maps.shape[1]):
        for frame in range(maps.shape[2]):
            yield clip, frame + 1, frame, maps[0, clip, frame]
            yield clip, frame, frame + 1, maps[1, clip, frame]


def _heads(tokens: Tensor) -> Tensor:
    """[N, H, K] -> [H, P, K] in fp32."""
    return wide(tokens[1:]).transpose(0, 1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q, k [N, H, K] of two frames -> [H, P, P] in fp32."""
    return torch.bmm(_heads(q) * q.shape[-1] ** -0.5, _heads(k).mT)
