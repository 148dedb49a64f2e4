"""The specification of the 8-bit ops in plain PyTorch. Letters: see ops.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.attention import Source, attention_reference
from kineticlip_kernels.fp8.format import FP8_MAX, Scaled, divided, value_scale
from kineticlip_kernels.mlp import bias_quick_gelu_reference
from kineticlip_kernels.norm import layer_norm_reference


def quantize_rows_reference(x: Tensor) -> Scaled:
    """The specification of `quantize_rows` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(dim=-1) / FP8_MAX
    return divided(wide, torch.where(scale > 0, scale, torch.ones_like(scale)))


def layer_norm_fp8_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Scaled:
    """The specification of `layer_norm_fp8` in plain PyTorch; nothing is rounded before the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = layer_norm_reference(wide, weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return quantize_rows_reference(normed)


def add_layer_norm_fp8_reference(
    residual: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Scaled]:
    """The specification of `add_layer_norm_fp8` in plain PyTorch."""
    total = residual + update
    return total, layer_norm_fp8_reference(total, weight, bias, eps)


def bias_quick_gelu_fp8_reference(x: Tensor, bias: Tensor) -> Scaled:
    """The specification of `bias_quick_gelu_fp8` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return quantize_rows_reference(bias_quick_gelu_reference(wide, bias))


def attention_fp8_reference(qkv: Tensor, *, sources: Sequence[Source] = ()) -> Scaled:
    """The specification of `attention_fp8` in plain PyTorch."""
    scale = value_scale(qkv, sources)  # [M]
    out = attention_reference(qkv, sources=sources).flatten(2)  # [M, N, H K]
    return divided(out.to(scale.dtype), scale.unsqueeze(1).expand(out.shape[:2]))


def linear_fp8_reference(
    x: Scaled, weight: Scaled, bias: Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The specification of `linear_fp8` in plain PyTorch."""
    wide = torch.promote_types(x.scale.dtype, torch.float32)
    product = F.linear(x.values.to(wide), weight.values.to(wide))
    out = product * x.scale.to(wide).unsqueeze(-1) * weight.scale.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(dtype)
