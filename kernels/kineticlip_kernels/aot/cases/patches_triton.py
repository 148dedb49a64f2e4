"""Launches of the resampler and the patch matrix at the engine's shapes, for compilation only."""

from __future__ import annotations

import torch

from kineticlip_kernels.patches.crops_triton import cut_crops_triton
from kineticlip_kernels.patches.unfold_triton import unfold_patches_triton


def crops(height: int, width: int, side: int) -> None:
    frames = torch.empty(32, 720, 1280, 3, dtype=torch.uint8, device="meta")
    boxes = [(0, 0, False), (width - side, 0, False), (5, 0, True)]
    cut_crops_triton(frames, boxes, width=width, height=height, side=side)


def patches(side: int, patch: int, dtype: torch.dtype) -> None:
    pixels = torch.empty(96, 3, side, side, dtype=torch.uint8, device="meta")
    unfold_patches_triton(pixels, patch, dtype=dtype)


CASES = {
    "cut_crops 336": lambda: crops(336, 597, 336),
    "cut_crops 224": lambda: crops(256, 455, 224),
    "unfold_patches L/14-336": lambda: patches(336, 14, torch.bfloat16),
    "unfold_patches B/16-224": lambda: patches(224, 16, torch.bfloat16),
    "unfold_patches fp32": lambda: patches(224, 32, torch.float32),
}

KINDS = {
    "patches.crops_triton._cut_columns": "bytes",  # its docstring says why, and what that costs
    "patches.crops_triton._cut_rows": "memory",
    "patches.unfold_triton._unfold": "stores",  # runs of 14 bytes in, whole rows of the matrix out
}
