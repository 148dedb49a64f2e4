"""QuickGELU and the specification of both ops in plain PyTorch. Letters: see ops.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.recompute import remember


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), elementwise."""
    if torch.is_grad_enabled() and x.requires_grad:
        return remember(x * torch.sigmoid(1.702 * x), quick_gelu, x)
    return torch.mul(x, 1.702).sigmoid_().mul_(x)  # the same numbers in one temporary


def bias_quick_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """The specification of `bias_quick_gelu` in plain PyTorch."""
    return quick_gelu(x + bias.to(x.dtype))


def linear_quick_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The specification of `linear_quick_gelu` in plain PyTorch."""
    return quick_gelu(F.linear(x, weight, bias))
