"""The specification of EVL's ops in plain PyTorch. Letters: see ops.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.dispatch import full_precision, wide
from kineticlip_kernels.tables import kept


def neighbour_maps_reference(q: Tensor, k: Tensor) -> Tensor:
    """The specification of `neighbour_maps` in plain PyTorch."""
    later, earlier = slice(1, None), slice(None, -1)
    pairs = [(q[:, later], k[:, earlier]), (q[:, earlier], k[:, later])]
    maps = []
    for queries, keys in pairs:
        queries, keys = wide(queries[:, :, 1:]), wide(keys[:, :, 1:])  # [B, T - 1, P, H, K]
        with full_precision(q):
            scores = torch.einsum("btphk,btrhk->bthpr", queries * q.shape[-1] ** -0.5, keys)
        maps.append(scores.softmax(dim=-1).mean(dim=2))  # [B, T - 1, P, P]
    return torch.stack(maps).to(q.dtype)


def displacement_reference(
    maps: Tensor, previous_weight: Tensor, next_weight: Tensor, *, grid: tuple[int, int]
) -> Tensor:
    """The specification of `displacement` in plain PyTorch; it gathers [P, P, C]."""
    table = offsets(grid, maps.device)  # [P, P]
    dtype = torch.promote_types(wide(maps).dtype, wide(previous_weight).dtype)
    with full_precision(maps):
        before, after = (
            torch.einsum("btpr,prc->btpc", part.to(dtype), weight.to(dtype)[table])
            for part, weight in zip(maps, (previous_weight, next_weight), strict=True)
        )  # [B, T - 1, P, C]
    total = F.pad(before, (0, 0, 0, 0, 1, 0)) + F.pad(after, (0, 0, 0, 0, 0, 1))
    return total.to(previous_weight.dtype)


@kept(16)
def offsets(grid: tuple[int, int], device: torch.device) -> Tensor:
    """The row of the offset weights for query patch p and key patch r. int64 [P, P]."""
    rows, columns = grid
    y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
    dy = y[:, None, None, None] - y[None, None, :, None] + rows - 1
    dx = x[None, :, None, None] - x[None, None, None, :] + columns - 1
    return (dy * (2 * columns - 1) + dx).reshape(rows * columns, rows * columns)


def attend_tokens_reference(
    query: Tensor,
    tokens: Tensor,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    position: Tensor | None = None,
    motion: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The specification of `attend_tokens` in plain PyTorch."""
    f = wide(tokens)  # [B, T, N, C]
    with full_precision(tokens):
        if conv_weight is not None and conv_bias is not None:
            clips, _, count, width = f.shape
            series = f.permute(0, 2, 3, 1).flatten(0, 1)  # [B * N, C, T]
            weight, bias = conv_weight.to(f.dtype), conv_bias.to(f.dtype)
            series = F.conv1d(series, weight, bias, padding=1, groups=width)
            f = f + series.unflatten(0, (clips, count)).permute(0, 3, 1, 2)
        if position is not None:
            f = f + position.to(f.dtype)[:, None]
        if motion is not None:
            f = f + F.pad(motion.to(f.dtype), (0, 0, 1, 0))
        z = F.layer_norm(f, f.shape[-1:], eps=eps).flatten(1, 2)  # [B, T * N, C]
        weights = (query.to(z.dtype) @ z.transpose(1, 2)).softmax(dim=-1)  # [B, Q, T * N]
        return (weights @ z).to(query.dtype)
