"""From decoded frames to what the first GEMM reads: resize and crop, then u8 - 128 patches.

Shape letters: U distinct frames, H and W their size, V crops, S the side of a crop, M = U * V
images, P the side of a patch, G patches of an image, Q = 3 * P * P rounded up to a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kineticlip_kernels.dispatch import (
    TRITON_DTYPES,
    Impl,
    UnsupportedInput,
    check_tensors,
    choose,
    dtype_name,
    interpreting,
    triton_installed,
)
from kineticlip_kernels.patches.reference import cut_crops_reference, unfold_patches_reference
from kineticlip_kernels.patches.resample import SUPPORT, Crop, Resample


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
    from kineticlip_kernels.patches.unfold_triton import unfold_patches_triton

    return unfold_patches_triton(pixels, patch, dtype=dtype)


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
