"""Pillow's 8-bit resampler as numbers: which source pixels an output sums, with what weights.

The order of its two passes is that of version 13: see `rows_first`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kineticlip_kernels.tables import kept

Resample = Literal["bicubic", "bilinear"]
Crop = tuple[int, int, bool]  # left edge, top edge, mirrored; in pixels of the resized frame

PRECISION = 22  # fractional bits of Pillow's 8-bit coefficients: 32 - 8 - 2
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}


def rows_first(source: Sequence[int], width: int, height: int) -> bool:
    """Whether Pillow 13 resizes the rows of a frame before its columns; source: its (H, W).

    Each pass rounds to bytes, so the order shows. It was the columns first until version 13; since
    then it is the rows where the height loses more than twice the pixels of the width.
    """
    lost_height, lost_width = source[0] - height, source[1] - width
    return lost_height > 0 and lost_height > 2 * lost_width


@kept(256)
def table_on(
    device: torch.device, length_in: int, length_out: int, resample: Resample
) -> tuple[Tensor, Tensor]:
    """`resample_table` there: a CUDA graph cannot record the copy, but what follows the first."""
    first, weights = resample_table(length_in, length_out, resample)
    return first.to(device), weights.to(device)


@kept(256)
def resample_table(length_in: int, length_out: int, resample: Resample) -> tuple[Tensor, Tensor]:
    """Pillow's coefficients (Resample.c, precompute_coeffs and normalize_coeffs_8bpc).

    -> first [length_out], the first source index of each output; weights [taps, length_out] in
    units of 2^-22, zero past the last tap. Both int32.
    """
    scale = length_in / length_out
    stretch = max(scale, 1.0)  # antialiasing: the kernel grows with the reduction
    support = SUPPORT[resample] * stretch
    centre = (torch.arange(length_out, dtype=torch.float64) + 0.5) * scale
    first = (centre - support + 0.5).trunc().clamp_(min=0)
    last = (centre + support + 0.5).trunc().clamp_(max=length_in)
    tap = torch.arange(int((last - first).max()), dtype=torch.float64)[:, None]  # [taps, 1]
    weights = _kernel((tap + first - centre + 0.5) * (1.0 / stretch), resample)
    weights = weights.where(tap < last - first, 0.0)
    weights = weights / weights.sum(dim=0)
    fixed = weights * (1 << PRECISION)
    return first.int(), (fixed + torch.copysign(torch.tensor(0.5), fixed)).trunc().int()


def _kernel(x: Tensor, resample: Resample) -> Tensor:
    x = x.abs()
    if resample == "bilinear":
        return (1.0 - x).clamp_(min=0.0)
    a = -0.5  # Keys' cubic, as Pillow has it; OpenCV and PyTorch without antialias use -0.75
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return near.where(x < 1.0, far).where(x < 2.0, 0.0)
