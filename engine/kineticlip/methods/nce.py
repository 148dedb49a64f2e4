"""Matching videos with sentences over all processes: the losses of the contrastive methods.

Shape letters: N pairs over all processes, b pairs of this one, E embedding.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

TARGET_SCALE = 10.0  # the target is softmax(10 G), G_ij = 1 where pair i and j share a class


def gather(rows: Tensor) -> Tensor:
    """[b, ...] of every process in rank order: [N, ...]; only this process's rows have a gradient.

    Each process thus differentiates the same loss by its own rows, and averaging over processes
    leaves 1 / world of the true gradient, as in the official code.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    local = rows.contiguous()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.detach())
    parts[dist.get_rank()] = local
    return torch.cat(parts)


def matching_loss(logits: Tensor, labels: Tensor, *, dual: bool = False) -> Tensor:
    """Mean over both directions of KL(softmax(10 G) || softmax(logits)), the official NCELoss.

    logits [N, N], scaled cosines of video i and the sentence of pair j; labels [N]. dual: logits
    are weighted first by their softmax over the other side (the official DualLoss).
    """
    same = (labels[:, None] == labels[None, :]).to(logits.dtype)
    return (divergence(logits, same, dual=dual) + divergence(logits.T, same, dual=dual)) / 2


def divergence(logits: Tensor, same: Tensor, *, dual: bool) -> Tensor:
    """One direction: KL of the rows of logits [N, N] from softmax(10 G), G = `same` [N, N]."""
    if dual:
        logits = logits * (logits / 1000).softmax(dim=0) * len(logits)
    target = (TARGET_SCALE * same).softmax(dim=1)
    return F.kl_div(logits.log_softmax(dim=1), target, reduction="batchmean")
