"""Frames to crops, and crops to the patch matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernel_bench import DEVICE, GPU, Case, Shape, spread
from kineticlip_kernels import cost_methods, patches
from kineticlip_kernels.dispatch import Impl

# Frames of 720p at the short side of the crops, three crops; on a CPU 4 frames of 240p.
FRAMES, HEIGHT, WIDTH = (32, 720, 1280) if GPU else (4, 240, 320)


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


def cut_crops(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    if dtype != torch.bfloat16:  # bytes in, bytes out
        return
    side = 336 if shape.tokens == 577 else 224
    width = side * WIDTH // HEIGHT
    boxes = [(0, 0, False), (width - side, 0, False), ((width - side) // 2, 0, False)]
    cost = cost_methods.cut_crops(FRAMES, HEIGHT, WIDTH, len(boxes), side)
    impls: list[Impl] = ["reference", "triton"] if GPU else ["reference"]
    for impl in impls:
        run = partial(
            patches.cut_crops, crops=boxes, width=width, height=side, side=side, impl=impl
        )
        yield Case("cut_crops", impl, dtype, shape, cost, frames, run)


def frames() -> tuple[Tensor]:
    return (pixels(FRAMES, HEIGHT, WIDTH, 3),)


def unfold_patches(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    patch = {577: 14, 257: 14, 197: 16}.get(shape.tokens, 32)
    side = patch * round((shape.tokens - 1) ** 0.5)
    cost = cost_methods.unfold_patches(shape.images, side, patch, dtype.itemsize)

    def make() -> tuple[Tensor]:
        return (pixels(shape.images, 3, side, side),)

    for impl in ["reference"] + ["torch.compile", "triton"] * GPU:
        face: Impl = "triton" if impl == "triton" else "reference"
        run = partial(patches.unfold_patches, patch=patch, dtype=dtype, impl=face)
        yield Case("unfold_patches", impl, dtype, shape, cost, make, run)


CASES = spread(cut_crops, unfold_patches)


def test_patches(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["p50_ms"] > 0
