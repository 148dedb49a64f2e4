"""The specification of both ops in plain PyTorch. Letters: see ops.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The specification of `layer_norm` in plain PyTorch."""
    # ATen's CPU kernel takes 16-bit rows with fp32 parameters too, in one pass, fp32 inside.
    mixed = x.device.type == "cpu" and x.itemsize == 2 and weight.dtype == torch.float32
    if weight.dtype == bias.dtype and (weight.dtype == x.dtype or mixed):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype)


def add_layer_norm_reference(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The specification of `add_layer_norm` in plain PyTorch."""
    total = residual + update
    return total, layer_norm_reference(total, weight, bias, eps)
