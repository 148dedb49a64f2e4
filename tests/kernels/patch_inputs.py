"""Frames and crops worth testing, for the tests of the resampler."""

from __future__ import annotations

import torch
from kernel_rig import DEVICE
from torch import Tensor

# Inside, two with one column and different rows, mirrored, past an edge, and wholly outside.
CROPS = [(0, 0, False), (7, 0, False), (3, 2, True), (3, 0, False), (-5, -3, True), (40, 0, False)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Random bytes, a part of them 0 or 255: cubic weights overshoot there and must be clamped."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    hard = torch.rand(shape, generator=generator) < 0.5
    return torch.where(hard, (pixels > 127) * 255, pixels).to(torch.uint8).to(DEVICE)
