"""Pillow is the oracle of the resampler's reference, to the byte."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from kernel_rig import DEVICE
from patch_inputs import CROPS, noise
from PIL import Image
from torch import Tensor

from kineticlip_kernels.patches import Crop, Resample, cut_crops
from pillow_13 import resized

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def pillow(
    frames: Tensor, crops: Sequence[Crop], width: int, height: int, side: int, resample: Resample
) -> Tensor:
    views = []
    for frame in frames.cpu().numpy():
        image = resized(Image.fromarray(frame), (width, height), FILTERS[resample])
        for x, y, mirrored in crops:
            crop = image.crop((x, y, x + side, y + side))
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else crop
            views.append(np.asarray(crop).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(views)).unflatten(0, (len(frames), len(crops))).to(DEVICE)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((53, 37), (31, 24)),  # both smaller
        ((20, 20), (47, 64)),  # both larger
        ((31, 90), (31, 24)),  # one axis as it was
        ((320, 240), (341, 256)),  # Kinetics at 340 short side, for 224-pixel crops
        ((7, 5), (1, 1)),
        ((24, 60), (30, 40)),  # Pillow 13 begins with the rows
        ((48, 104), (22, 48)),
        ((30, 50), (20, 30)),  # the height loses twice as many, not more
    ],
)
def test_reference_is_pillow_to_the_byte(
    source: tuple[int, int], target: tuple[int, int], resample: Resample
) -> None:
    frames, side = noise(2, source[1], source[0], 3), min(24, *target)
    width, height = target
    found = cut_crops(
        frames, CROPS, width=width, height=height, side=side, resample=resample, impl="reference"
    )
    assert torch.equal(found, pillow(frames, CROPS, width, height, side, resample))
