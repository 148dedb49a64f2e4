"""The specification of both ops in plain PyTorch. Letters: see ops.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.launch import Operator
from kineticlip_kernels.patches.embedding import patch_columns
from kineticlip_kernels.patches.resample import PRECISION, Crop, Resample, rows_first, table_on


def cut_crops_reference(
    frames: Tensor,
    crops: Sequence[Crop],
    *,
    width: int,
    height: int,
    side: int,
    resample: Resample = "bicubic",
) -> Tensor:
    """The specification of `cut_crops` in plain PyTorch."""
    passes = [(2, width), (1, height)]
    if rows_first(frames.shape[1:3], width, height):
        passes.reverse()
    resized = frames
    for axis, length in passes:
        resized = _resample_op(resized, axis, length, resample)  # [U, h, w, 3] at last
    resized = resized.permute(0, 3, 1, 2)  # [U, 3, h, w]
    views = frames.new_zeros(len(frames), len(crops), 3, side, side)  # [U, V, 3, S, S]
    for view, (x, y, mirrored) in enumerate(crops):
        inside = resized[:, :, max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)]
        top, left = max(-y, 0), max(-x, 0)
        rows, columns = inside.shape[2:]
        views[:, view, :, top : top + rows, left : left + columns] = inside
        if mirrored:
            views[:, view] = views[:, view].flip(-1)
    return views


def _resample(pixels: Tensor, axis: int, length: int, resample: str) -> Tensor:
    """One pass of Pillow's 8-bit resampler along one axis of [U, H, W, 3]."""
    kind = cast("Resample", resample)
    first, weights = table_on(pixels.device, pixels.shape[axis], length, kind)
    shape = [-1 if dim == axis else 1 for dim in range(4)]
    total = None
    for tap, weight in enumerate(weights):
        source = (first + tap).clamp(max=pixels.shape[axis] - 1)  # its weight is 0 past the end
        part = pixels.index_select(axis, source).int().mul_(weight.view(shape))
        total = part.add_(1 << (PRECISION - 1)) if total is None else total.add_(part)
    assert total is not None
    return (total >> PRECISION).clamp_(0, 255).to(torch.uint8)


def _resampled_shape(pixels: Tensor, axis: int, length: int, resample: str) -> Tensor:
    return pixels.new_empty([*pixels.shape[:axis], length, *pixels.shape[axis + 1 :]])


# An operator, so that torch.compile need not trace the table, whose height depends on its values.
_resample_op = Operator("resample", _resample, fake=_resampled_shape)


def unfold_patches_reference(
    pixels: Tensor, patch: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The specification of `unfold_patches` in plain PyTorch."""
    windows = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [M, 3, g, g, P, P]
    ordered = windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [M, G, 3 * P * P]
    matrix = ordered.to(dtype).sub_(128)
    return F.pad(matrix, (0, patch_columns(patch) - matrix.shape[-1]))  # [M, G, Q]
