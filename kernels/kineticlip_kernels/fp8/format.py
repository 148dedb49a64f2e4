"""The 8-bit format: e4m3 values with a scale a row.

Micikevicius et al., "FP8 Formats for Deep Learning" (2022), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kineticlip_kernels.attention import Source

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448


@dataclass(frozen=True)
class Scaled:
    """A tensor in 8 bits: values [..., D] e4m3 times scale [...] fp32, one a row."""

    values: Tensor
    scale: Tensor

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., D] in dtype."""
        return self.values.to(dtype) * self.scale.to(dtype).unsqueeze(-1)


def divided(wide: Tensor, scale: Tensor) -> Scaled:
    """wide / scale in e4m3; clamped, because PyTorch's cast makes NaN of what is too large."""
    return Scaled((wide / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)


def value_scale(qkv: Tensor, sources: Sequence[Source] = ()) -> Tensor:
    """max|v| / 448 of each image and its sources, 1 where all values are zero. -> [M]."""
    largest = _largest(qkv[:, :, 2])
    for _, v in sources:
        shared = _largest(v).repeat_interleave(len(qkv) // len(v))
        largest = torch.maximum(largest, shared)
    scale = largest.to(torch.promote_types(qkv.dtype, torch.float32)) / FP8_MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _largest(v: Tensor) -> Tensor:
    """max|v| of each row of [M', n, H, K]; 0 where a row has no tokens."""
    if v[0:1].numel() == 0:
        return v.new_zeros(len(v))
    largest: Tensor = torch.linalg.vector_norm(v, float("inf"), dim=(1, 2, 3))
    return largest
