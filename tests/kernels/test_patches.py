"""Resize, crop and patch matrix: the Triton face is the reference to the byte."""

from __future__ import annotations

from functools import partial
from typing import Any, TypedDict

import pytest
import torch
import torch.nn.functional as F
from kernel_rig import BF16, DEVICE, DTYPES, FP32, on_gpu
from patch_inputs import CROPS, noise
from torch import Tensor

from kineticlip_kernels.dispatch import Impl, UnsupportedInput
from kineticlip_kernels.patches import (
    Resample,
    crops_triton,
    cut_crops,
    cut_crops_reference,
    fold_patch_embedding,
    patch_columns,
    reference,
    resample,
    resample_table,
    unfold_patches,
    unfold_patches_reference,
    unfold_triton,
)


class Geometry(TypedDict):
    width: int
    height: int
    side: int


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("source", "target", "side"),
    [
        ((53, 37), (31, 24), 24),
        ((20, 18), (47, 41), 33),
        ((30, 24), (30, 24), 16),
        ((24, 60), (30, 40), 24),  # the rows first
        *on_gpu(((1280, 720), (597, 336), 336)),
    ],
)
def test_triton_is_the_reference_to_the_byte(
    source: tuple[int, int], target: tuple[int, int], side: int, resample: Resample
) -> None:
    frames = noise(2, source[1], source[0], 3)
    geometry: Geometry = {"width": target[0], "height": target[1], "side": side}
    found = cut_crops(frames, CROPS, **geometry, resample=resample, impl="triton")
    expected = cut_crops_reference(frames, CROPS, **geometry, resample=resample)
    assert torch.equal(found, expected)


def test_frames_of_any_strides() -> None:
    planar = noise(3, 1, 40, 50).permute(1, 2, 3, 0)  # as a GPU decoder may hand them out
    box = noise(1, 60, 70, 3)[:, 7:47, 9:59]  # a crop before the resize
    for frames in (planar, box):
        assert not frames.is_contiguous()
        crops = [(1, 2, False)]
        geometry: Geometry = {"width": 30, "height": 24, "side": 20}
        found = cut_crops(frames, crops, **geometry, impl="triton")
        assert torch.equal(found, cut_crops_reference(frames.contiguous(), crops, **geometry))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nothing_to_cut(impl: Impl) -> None:
    cut = partial(cut_crops, width=8, height=8, side=6, impl=impl)
    assert cut(noise(0, 9, 9, 3), [(0, 0, False)]).shape == (0, 1, 3, 6, 6)
    assert cut(noise(2, 9, 9, 3), []).shape == (2, 0, 3, 6, 6)
    assert not cut(noise(1, 9, 9, 3), [(100, -50, False)]).any()


def test_weights_of_one_output_sum_to_one() -> None:
    for lengths in [(640, 256), (256, 640), (1, 9), (9, 1)]:
        _, weights = resample_table(*lengths, "bicubic")
        taps = len(weights)
        assert (weights.sum(dim=0) - (1 << 22)).abs().max() <= taps / 2 + 1  # each tap is rounded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "patch"), [((28, 42), 14), ((35, 31), 8), ((10, 9), 5), *on_gpu(((336, 336), 14))]
)
def test_patch_matrix_is_exact(size: tuple[int, int], patch: int, dtype: torch.dtype) -> None:
    pixels = noise(2, 3, *size)
    found = unfold_patches(pixels, patch, dtype=dtype, impl="triton")
    assert found.dtype == dtype
    assert torch.equal(found, unfold_patches_reference(pixels, patch, dtype=dtype))
    shifted = pixels.double() - 128
    columns = F.unfold(shifted, patch, stride=patch).transpose(1, 2)  # [M, G, 3 * P * P]
    assert torch.equal(found[..., : 3 * patch * patch].double(), columns)
    assert not found[..., 3 * patch * patch :].any()
    assert found.shape[-1] == patch_columns(patch) and found.shape[-1] % 16 == 0


def test_patch_matrix_of_strided_and_no_images() -> None:
    crops = noise(4, 2, 3, 16, 16)[::2, 1]  # the images of one crop
    found = unfold_patches(crops, 8, impl="triton")
    assert torch.equal(found, unfold_patches_reference(crops, 8))
    assert unfold_patches(noise(0, 3, 16, 16), 8, impl="triton").shape == (0, 4, 192)


def test_folded_embedding_is_the_convolution_of_normalised_pixels() -> None:
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 3, 14, 14, dtype=torch.float64, generator=generator).to(DEVICE)
    pixels = noise(2, 3, 30, 28)
    statistics = [
        torch.tensor(s, dtype=torch.float64).view(3, 1, 1).to(DEVICE) for s in (mean, std)
    ]
    normalised = (pixels.double() / 255 - statistics[0]) / statistics[1]
    truth = F.conv2d(normalised, weight, stride=14).flatten(2).transpose(1, 2)  # [M, G, D]

    folded, bias = fold_patch_embedding(weight, mean, std)
    matrix = unfold_patches(pixels, 14, dtype=FP32).double()
    assert (F.linear(matrix, folded, bias) - truth).abs().max() <= 1e-12 * truth.abs().max()

    # bf16: bytes are exact, so this is no further off than the usual normalise-then-cast.
    rough, usual = weight.to(BF16), normalised.to(BF16)
    narrow = F.linear(
        unfold_patches(pixels, 14, dtype=BF16), *fold_patch_embedding(rough, mean, std)
    )
    rounded = F.conv2d(normalised, rough.double(), stride=14).flatten(2).transpose(1, 2)
    baseline = F.conv2d(usual, rough, stride=14).flatten(2).transpose(1, 2)
    assert (narrow - rounded).square().mean() <= 2 * (baseline - rounded).square().mean()


def test_folded_embedding_trains_the_convolution() -> None:
    weight = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w: fold_patch_embedding(w, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)), weight
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_under_torch_compile() -> None:
    frames = noise(1, 12, 14, 3)

    def chain(frames: Tensor) -> Tensor:
        crops = cut_crops(frames, [(1, 0, True)], width=10, height=9, side=8, impl="triton")
        return unfold_patches(crops[:, 0], 4, impl="triton")

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(frames), chain(frames))
    cut = (frames, [1, 0, 1], 10, 9, 8, "bicubic")
    torch.library.opcheck(crops_triton._cut_crops_op.operator, cut)
    unfold = (noise(2, 3, 8, 8), 4, BF16)
    torch.library.opcheck(unfold_triton._unfold_patches_op.operator, unfold)


def test_reference_under_torch_compile() -> None:
    def cut(frames: Tensor) -> Tensor:
        crops = [(1, 0, True), (-3, 2, False)]
        return cut_crops(frames, crops, width=11, height=9, side=8, impl="reference")

    planar = noise(3, 2, 13, 15).permute(1, 2, 3, 0)
    for frames in (noise(2, 13, 15, 3), planar):
        compiled = torch.compile(cut, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(frames), cut(frames))
    for axis in (1, 2):
        torch.library.opcheck(reference._resample_op.operator, (planar, axis, 7, "bilinear"))


def test_reference_copies_nothing_from_the_host_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = noise(1, 17, 15, 3)
    cut = partial(cut_crops_reference, frames, [(1, 0, True)], width=11, height=9, side=8)
    expected = cut()
    monkeypatch.setattr(resample, "resample_table", None)  # which makes tables on the host
    assert torch.equal(cut(), expected)
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = cut()
        graph.replay()
        assert torch.equal(found, expected)


def test_what_cannot_run_says_why() -> None:
    geometry: Geometry = {"width": 8, "height": 8, "side": 6}
    unknown: Any = "nearest"
    with pytest.raises(UnsupportedInput, match=r"expected uint8 \[U, H, W, 3\]"):
        cut_crops(torch.zeros(2, 9, 9, 3), [], **geometry)
    with pytest.raises(UnsupportedInput, match="unknown resample 'nearest'"):
        cut_crops(noise(1, 9, 9, 3), [], resample=unknown, **geometry)
    with pytest.raises(UnsupportedInput, match="resized to 0 x 8"):
        cut_crops(noise(1, 9, 9, 3), [], width=0, height=8, side=6)
    with pytest.raises(UnsupportedInput, match="patch is 16, expected a side in pixels of 1 to 9"):
        unfold_patches(noise(1, 3, 9, 9), 16)
    with pytest.raises(UnsupportedInput, match="dtype is fp64"):
        unfold_patches(noise(1, 3, 9, 9), 3, dtype=torch.float64, impl="triton")
