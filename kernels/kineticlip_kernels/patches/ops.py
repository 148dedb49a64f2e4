"""From decoded frames to what the first GEMM reads: resize and crop, then u8 - 128 patches.

Shape letters: U distinct frames, H and W their size, V crops, S the side of a crop, M = U * V
images, P the side of a patch, G patches of an image, Q = 3 * P * P rounded up to a multiple of 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.dispatch import (
    TRITON_DTYPES,
    Impl,
    UnsupportedInput,
    check_operands,
    check_tensors,
    choose,
    dtype_name,
    interpreting,
    triton_installed,
)
from kineticlip_kernels.launch import Operator
from kineticlip_kernels.tables import kept

Resample = Literal["bicubic", "bilinear"]
Crop = tuple[int, int, bool]  # left edge, top edge, mirrored; in pixels of the resized frame

PRECISION = 22  # fractional bits of Pillow's 8-bit coefficients: 32 - 8 - 2
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
ALIGNMENT = 16  # columns of the patch matrix: rows stay 16-byte aligned in every dtype


def cut_crops(
    frames: Tensor,
    crops: Sequence[Crop],
    *,
    width: int,
    height: int,
    side: int,
    resample: Resample = "bicubic",
    impl: Impl = "auto",
) -> Tensor:
    """Every crop of every frame, to the byte as Pillow's `resize` and `crop` make it.

    That of version 13: see `rows_first`.

    frames: uint8 [U, H, W, 3], any strides; width, height: of the resized frame; crops: (x, y,
    mirrored) with side S, black where they leave the frame -> uint8 [U, V, 3, S, S]. For a crop
    that comes before the resize, pass the slice of the frames. Pillow's Resample.c and Crop.c.
    Raises UnsupportedInput for other shapes, dtypes and crops, and where the face asked for
    cannot run. No gradient.
    """
    _check_frames(frames, width, height, side, resample)
    _check_crops(crops)
    if choose("cut_crops", impl, pixel_reasons(impl, frames=frames)) == "reference":
        return cut_crops_reference(
            frames, crops, width=width, height=height, side=side, resample=resample
        )
    from kineticlip_kernels.patches.crops_triton import cut_crops_triton

    return cut_crops_triton(frames, crops, width=width, height=height, side=side, resample=resample)


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
    resized = frames
    for axis, length in reversed(passes) if rows_first(frames, width, height) else passes:
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


def rows_first(frames: Tensor, width: int, height: int) -> bool:
    """Whether Pillow 13 resizes the rows of these frames [U, H, W, 3] before their columns.

    Each pass rounds to bytes, so the order shows. It was the columns first until version 13; since
    then it is the rows where the height loses more than twice the pixels of the width.
    """
    lost_height, lost_width = frames.shape[1] - height, frames.shape[2] - width
    return lost_height > 0 and lost_height > 2 * lost_width


def _resample(pixels: Tensor, axis: int, length: int, resample: str) -> Tensor:
    """One pass of Pillow's 8-bit resampler along one axis of [U, H, W, 3]."""
    kind = cast("Resample", resample)
    first, weights = _table_on(pixels.device, pixels.shape[axis], length, kind)
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


@kept(256)
def _table_on(
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


def unfold_patches(
    pixels: Tensor, patch: int, *, dtype: torch.dtype = torch.float32, impl: Impl = "auto"
) -> Tensor:
    """The patch matrix of the first GEMM: byte - 128, exact in fp32, fp16 and bf16.

    pixels: uint8 [M, 3, height, width], any strides; dtype of the result -> [M, G, Q], patches row
    by row, columns in the order (channel, y, x) and zero past 3 * P * P. Pixels beyond the last
    whole patch are left out, as a convolution leaves them. To be multiplied by the weight that
    `fold_patch_embedding` makes. Raises UnsupportedInput for other shapes and dtypes, and where
    the face asked for cannot run. No gradient.
    """
    _check_pixels(pixels, patch)
    if not dtype.is_floating_point:
        raise UnsupportedInput(f"unfold_patches: dtype is {dtype_name(dtype)}, expected a float")
    why_not = pixel_reasons(impl, pixels=pixels)
    if dtype not in TRITON_DTYPES:
        why_not.append(f"dtype is {dtype_name(dtype)} (supported: fp32, fp16, bf16)")
    if choose("unfold_patches", impl, why_not) == "reference":
        return unfold_patches_reference(pixels, patch, dtype=dtype)
    from kineticlip_kernels.patches.crops_triton import unfold_patches_triton

    return unfold_patches_triton(pixels, patch, dtype=dtype)


def unfold_patches_reference(
    pixels: Tensor, patch: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The specification of `unfold_patches` in plain PyTorch."""
    windows = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [M, 3, g, g, P, P]
    ordered = windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # [M, G, 3 * P * P]
    matrix = ordered.to(dtype).sub_(128)
    return F.pad(matrix, (0, patch_columns(patch) - matrix.shape[-1]))  # [M, G, Q]


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


def pixel_reasons(impl: str, **operand: Tensor) -> list[str]:
    """Why the Triton faces of this module cannot take these bytes."""
    why_not = [] if triton_installed() else ["triton is not installed"]
    for name, pixels in operand.items():
        if not pixels.is_cuda and not (impl == "triton" and interpreting()):
            why_not.append(f"{name} are on {pixels.device.type}")
    return why_not


def _check_frames(frames: Tensor, width: int, height: int, side: int, resample: str) -> None:
    check_tensors("cut_crops", frames=frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise UnsupportedInput(
            f"cut_crops: frames are {dtype_name(frames.dtype)} {tuple(frames.shape)}, "
            "expected uint8 [U, H, W, 3]"
        )
    if resample not in SUPPORT:
        raise UnsupportedInput(
            f"cut_crops: unknown resample {resample!r}; known: bicubic, bilinear"
        )
    if min(width, height, side, *frames.shape[1:3]) < 1:
        raise UnsupportedInput(
            f"cut_crops: frames of {frames.shape[2]} x {frames.shape[1]} resized to "
            f"{width} x {height}, crops of {side}: all should be at least 1"
        )


def _check_crops(crops: Sequence[Crop]) -> None:
    """The kernel reads them as one list of numbers: a box of four would shift all behind it."""
    for index, crop in enumerate(crops):
        whole = isinstance(crop, Sequence) and all(isinstance(number, int) for number in crop)
        if not whole or len(crop) != 3:
            raise UnsupportedInput(
                f"cut_crops: crop {index} is {crop!r}, expected (x, y, mirrored) in whole pixels"
            )


def _check_pixels(pixels: Tensor, patch: int) -> None:
    check_tensors("unfold_patches", pixels=pixels)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.uint8:
        raise UnsupportedInput(
            f"unfold_patches: pixels are {dtype_name(pixels.dtype)} {tuple(pixels.shape)}, "
            "expected uint8 [M, 3, height, width]"
        )
    largest = min(pixels.shape[2:])
    if not isinstance(patch, int) or not 1 <= patch <= largest:
        raise UnsupportedInput(
            f"unfold_patches: patch is {patch!r}, expected a side in pixels of 1 to {largest}"
        )
