"""The patch embedding of normalised pixels as one GEMM on bytes. Letters: see ops.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.dispatch import UnsupportedInput, check_operands

ALIGNMENT = 16  # columns of the patch matrix: rows stay 16-byte aligned in every dtype


def patch_columns(patch: int) -> int:
    """Q: 3 * P * P rounded up to a multiple of 16 (588 -> 592 at P = 14)."""
    return math.ceil(3 * patch * patch / ALIGNMENT) * ALIGNMENT


def fold_patch_embedding(
    conv_weight: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The patch embedding of normalised pixels, as a GEMM on the bytes of `unfold_patches`.

    conv_weight [D, 3, P, P]; mean, std: three floats each, of pixels in [0, 1] -> weight [D, Q]
    and bias [D] of its dtype, such that patches @ weight.T + bias is the convolution of
    (byte / 255 - mean) / std. Differentiable in conv_weight. The bytes are exact in bf16, so the
    product is closer to the fp64 truth (1.7e-3) than with pixels normalised first (2.3e-3).
    Raises UnsupportedInput for other shapes.
    """
    check_operands("fold_patch_embedding", conv_weight=conv_weight)
    shape = conv_weight.shape
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise UnsupportedInput(
            f"fold_patch_embedding: conv_weight is {tuple(shape)}, expected [D, 3, P, P]"
        )
    if len(mean) != 3 or len(std) != 3:
        raise UnsupportedInput(
            f"fold_patch_embedding: {len(mean)} means and {len(std)} stds, expected three each"
        )
    wide = conv_weight.to(torch.promote_types(conv_weight.dtype, torch.float32))
    # Channel by channel with plain numbers: a tensor of them would be a copy from the host, which
    # cannot be recorded in a CUDA graph.
    channels = wide.unbind(1)  # [D, P, P] each
    shifts = [(128 / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    parts = [part * shift for part, shift in zip(channels, shifts, strict=True)]
    bias = torch.stack(parts, dim=1).sum(dim=(1, 2, 3))  # [D]
    scaled = [part / (255 * s) for part, s in zip(channels, std, strict=True)]
    weight = torch.stack(scaled, dim=1).flatten(1)  # [D, 3 * P * P]
    padding = patch_columns(conv_weight.shape[-1]) - weight.shape[1]
    return F.pad(weight, (0, padding)).to(conv_weight.dtype), bias.to(conv_weight.dtype)
