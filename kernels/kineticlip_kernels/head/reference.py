"""The specification of the head's ops in plain PyTorch. Letters: see ops.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.dispatch import full_precision, wide

EPS = 1e-12  # of the norm: an embedding of zeros stays zeros instead of becoming NaN
IGNORED = -100  # the label of a row without one, as in F.cross_entropy


def mean_normalize_reference(x: Tensor) -> Tensor:
    """The specification of `mean_normalize` in plain PyTorch."""
    return F.normalize(wide(x).mean(dim=1), dim=-1, eps=EPS).to(x.dtype)


def class_cross_entropy_reference(
    x: Tensor, classes: Tensor, labels: Tensor, scale: Tensor
) -> Tensor:
    """The specification of `class_cross_entropy` in plain PyTorch."""
    with full_precision(x):
        logits = scale.reshape(()) * (wide(x) @ wide(classes).T)  # [N, C]
    known = (labels >= 0) & (labels < len(classes))
    loss = F.cross_entropy(
        logits, labels.where(known, IGNORED), reduction="none", ignore_index=IGNORED
    )
    return loss.where(known | (labels == IGNORED), float("nan"))


@torch.no_grad()
def top_classes_reference(
    x: Tensor, classes: Tensor, k: int, *, scale: float = 100.0
) -> tuple[Tensor, Tensor]:
    """The specification of `top_classes` in plain PyTorch."""
    views = x if x.ndim == 3 else x.unsqueeze(1)  # [N, V, E]
    with full_precision(x):
        scores = mean_softmax_reference(scale * (wide(views) @ wide(classes).T))  # [N, C]
    probabilities, numbers = scores.topk(k, dim=-1)
    return probabilities, numbers


def mean_softmax_reference(logits: Tensor) -> Tensor:
    """The specification of `mean_softmax` in plain PyTorch."""
    return wide(logits).softmax(dim=-1).mean(dim=1)
