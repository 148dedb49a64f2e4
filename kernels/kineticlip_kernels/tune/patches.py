"""Crops and patches of one video."""

from __future__ import annotations

from functools import partial

import torch

from kineticlip_kernels import patches
from kineticlip_kernels.tune.search import Run, Target, grid
from kineticlip_kernels.tune.shapes import Sizes


def patches_targets(at: Sizes) -> tuple[Target, ...]:
    def cut(device: torch.device) -> Run:
        height, width = at.pixels
        frames = torch.randint(
            0, 256, (at.frames, height, width, 3), dtype=torch.uint8, device=device
        )
        resized = at.crop * width // height
        left, right = 0, resized - at.crop
        crops = [(x, 0, False) for x in (left, right // 2, right)]
        return partial(
            patches.cut_crops, frames, crops, width=resized, height=at.crop, side=at.crop,
            impl="triton",
        )  # fmt: skip

    def unfold(device: torch.device) -> Run:
        shape = (at.frames, 3, at.crop, at.crop)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        return partial(
            patches.unfold_patches, pixels, at.crop // at.side, dtype=torch.bfloat16, impl="triton"
        )

    blocks = grid(BLOCK_ROWS=(4, 8, 16), BLOCK_COLUMNS=(64, 128), num_warps=(4, 8))
    return (
        Target("cut_columns", {}, cut, blocks),
        Target("cut_rows", {}, cut, blocks),
        Target("unfold_patches", {}, unfold, blocks),
    )
