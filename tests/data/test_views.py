"""Spatial views against the official codes' pixels: resize, crops, order, padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kineticlip.config import DataConfig
from kineticlip.data import sampling
from kineticlip.data.batch import VideoViews
from kineticlip.data.pipelines import PIPELINES
from kineticlip.data.statistics import CLIP_STATISTICS, PixelStatistics
from kineticlip.data.views import (
    Crop,
    Geometry,
    apply_pillow,
    apply_tensor,
    evl_geometry,
    resize_image,
    resize_pillow,
    text4vis_geometry,
)
from kineticlip.runtime.errors import UserError
from kineticlip_kernels.patches import Resample, cut_crops_reference

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCES = dict(np.load(GOLDEN / "text4vis" / "crops_src.npz"))
CROPS = dict(np.load(GOLDEN / "text4vis" / "crops.npz"))
CASES = sorted({tuple(key.split("/")[:2]) for key in CROPS})


def normalised(images: torch.Tensor) -> torch.Tensor:
    clip = CLIP_STATISTICS
    mean, std = torch.tensor(clip.mean).view(3, 1, 1), torch.tensor(clip.std).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


@pytest.mark.parametrize(("source", "side"), CASES)
def test_text4vis_crops_are_pixel_exact(source: str, side: str) -> None:
    first = SOURCES[f"src_{source}"]
    size = int(side.removeprefix("in"))
    width, height = map(int, source.split("x"))
    prefix = f"{source}/{side}"
    grid = np.linspace(0, size - 1, 16).astype(int)
    counts = [count for count in (1, 3, 5, 10) if f"{prefix}/crops{count}/sum" in CROPS]
    assert counts[:3] == [1, 3, 5]
    for count in counts:
        shape = text4vis_geometry(width, height, size=size, crops=count)
        images = apply_pillow(np.stack([first, 255 - first]), shape, crops=shape.crops)
        flat = images.transpose(0, 1).flatten(0, 1)  # [crops * 2, 3, S, S], crop-major
        golden = {key: CROPS[f"{prefix}/crops{count}/{key}"] for key in ("grid_u8", "sum")}
        np.testing.assert_array_equal(flat.numpy()[:, :, grid][..., grid], golden["grid_u8"])
        pixels = normalised(flat)
        sums = pixels.double().sum((2, 3)).numpy()
        np.testing.assert_allclose(sums, golden["sum"], rtol=1e-12, atol=1e-9)
        first_grid = pixels[0].numpy()[:, grid][..., grid]
        np.testing.assert_allclose(
            first_grid, CROPS[f"{prefix}/crops{count}/grid_norm_first"], rtol=1e-6, atol=1e-6
        )
    resized = resize_pillow(first, shape.width, shape.height)
    assert [shape.width, shape.height] == CROPS[f"{prefix}/resized_wh"].tolist()
    assert resized.sum((0, 1), dtype=np.int64).tolist() == CROPS[f"{prefix}/resized_sum"].tolist()


def test_one_centre_crop_in_full() -> None:
    keys = [key for key in CROPS if key.endswith("full_u8_frame0")]
    assert keys
    for key in keys:
        source = SOURCES[f"src_{key.split('/')[0]}"]
        shape = text4vis_geometry(source.shape[1], source.shape[0], size=224, crops=1)
        np.testing.assert_array_equal(apply_pillow(source[None], shape)[0, 0].numpy(), CROPS[key])


RUNS = json.loads((GOLDEN / "text4vis" / "case_multiview.json").read_text())


@pytest.mark.parametrize("run", sorted(RUNS["views"]))
def test_text4vis_views_end_to_end(run: str) -> None:
    """Frame choice, crops and their order, through the indirection that encodes nothing twice."""
    videos = np.load(GOLDEN / "text4vis" / "multiview_videos.npz")
    golden = load_file(GOLDEN / "text4vis" / "case_multiview.safetensors")
    size = json.loads((GOLDEN / "text4vis" / "model_config.json").read_text())["res"]
    view = RUNS["views"][run]
    sampler = sampling.text4vis_dense_test if view["dense"] else sampling.text4vis_uniform_test
    for number, line in enumerate(RUNS["list"]):
        frames = videos[line.split()[0]]
        indices = sampler(len(frames), view["T"], view["clips"])
        assert (indices.ravel() + 1).tolist() == view["indices_1based"][number]
        frame_numbers, index = np.unique(indices, return_inverse=True)
        shape = text4vis_geometry(frames.shape[2], frames.shape[1], size=size, crops=view["crops"])
        crops, place = shape.distinct()
        item = VideoViews(
            name=line,
            label=0,
            images=apply_pillow(frames[frame_numbers], shape),
            frame_index=torch.from_numpy(index.reshape(indices.shape)),
            crop_index=torch.from_numpy(place),
            decoder="none",
            num_frames=len(frames),
        )
        assert item.images.shape[:2] == (len(set(indices.ravel().tolist())), len(crops))
        sums = normalised(item.clips()).double().sum((3, 4))  # [crops * K, T, 3]
        expected = golden[f"{run}/input_sum_per_view_frame_channel"][number]
        torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-9)


EVL = json.loads((GOLDEN / "evl" / "samplers.json").read_text())


def test_evl_geometry_matches_the_official_boxes() -> None:
    for case in EVL["resize"]:
        shape = evl_geometry(case["w"], case["h"], size=case["spatial_size"], crops=1)
        assert [shape.height, shape.width] == case["resized"], case
    compared = 0
    for case in EVL["crops"]:
        size = case["spatial_size"]
        shape = evl_geometry(case["w"], case["h"], size=size, crops=case["num_spatial_views"])
        if (shape.height, shape.width) != (case["h"], case["w"]):
            continue  # a frame whose short side is not the crop's: resized first, never cut as is
        boxes = [[box.y, box.x, box.y + size, box.x + size] for box in shape.crops]
        assert boxes == case["boxes_top_left_bottom_right"], case
        compared += 1
    assert compared >= 5


# Elsewhere PyTorch's resize may round the last bit of values up to 2 differently.
EXACT = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
LAST_BIT = 0.0 if EXACT else 2.4e-7


def evl_views(
    frames: np.ndarray, size: int, crops: int, indices: np.ndarray, statistics: PixelStatistics
) -> torch.Tensor:
    """The official layout [views, 3, T, S, S], spatial-major."""
    shape = evl_geometry(frames.shape[2], frames.shape[1], size=size, crops=crops)
    frame_numbers, index = np.unique(indices, return_inverse=True)
    place = shape.distinct()[1]
    item = VideoViews(
        name="",
        label=0,
        images=apply_tensor(
            frames[frame_numbers],
            shape,
            numbers=frame_numbers.tolist(),
            count=len(frames),
            statistics=statistics,
        ),
        frame_index=torch.from_numpy(index.reshape(indices.shape)),
        crop_index=torch.from_numpy(place),
        decoder="none",
        num_frames=len(frames),
    )
    return item.clips().transpose(1, 2)


def test_evl_views_are_exact() -> None:
    golden = np.load(GOLDEN / "evl" / "dataset.npz")
    meta = json.loads((GOLDEN / "evl" / "dataset.json").read_text())
    statistics = PixelStatistics(tuple(meta["mean"]), tuple(meta["std"]))
    for case in meta["tests"]:
        frames = golden[f"frames.{case['video']}"]
        indices = sampling.strided_test(
            len(frames), case["num_frames"], case["sampling_rate"], case["num_temporal_views"]
        )
        size, crops = case["spatial_size"], case["num_spatial_views"]
        got = evl_views(frames, size, crops, indices, statistics)
        np.testing.assert_allclose(got.numpy(), golden[case["key"]], rtol=0, atol=LAST_BIT)


@pytest.mark.parametrize(("crops", "clips"), [(1, 3)])
def test_vitaclip_views_are_exact(crops: int, clips: int) -> None:
    golden = np.load(GOLDEN / "vitaclip" / "data.npz")
    frames = golden["video_u8"]
    indices = sampling.strided_test(len(frames), 4, 4, clips)
    got = evl_views(frames, 32, crops, indices, CLIP_STATISTICS)
    expected = golden[f"eval_views_{crops}x{clips}"]
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=LAST_BIT)


def test_few_frames_resize_as_the_whole_video_does() -> None:
    frames = np.random.default_rng(3).integers(0, 256, (21, 40, 56, 3), dtype=np.uint8)
    shape = evl_geometry(56, 40, size=32, crops=3)
    whole = apply_tensor(frames, shape, statistics=CLIP_STATISTICS, numbers=range(21), count=21)
    for numbers in ([0], [20], [3, 9, 17], [1, 2, 15, 16, 20], list(range(21))):
        some = apply_tensor(
            frames[numbers], shape, statistics=CLIP_STATISTICS, numbers=numbers, count=21
        )
        torch.testing.assert_close(some, whole[numbers], rtol=0, atol=LAST_BIT)


def test_a_square_video_has_one_crop_where_three_are_named() -> None:
    for pipeline in ("text4vis", "bike", "evl"):
        square = PIPELINES[pipeline].geometry(300, 300, DataConfig(), 3)
        wide = PIPELINES[pipeline].geometry(340, 256, DataConfig(), 3)
        boxes, place = square.distinct()
        assert place.tolist() == ([0, 0, 0] if pipeline == "evl" else [0, 1, 2])
        assert len(boxes) == place.max() + 1
        assert wide.distinct()[1].tolist() == [0, 1, 2]
    # At 336 pixels Text4Vis resizes to the crop's own size, so the square has one box there too.
    square = text4vis_geometry(300, 300, size=336, crops=3)
    assert square.distinct()[1].tolist() == [0, 0, 0]
    frames = np.random.default_rng(0).integers(0, 256, (2, 300, 300, 3), dtype=np.uint8)
    assert apply_pillow(frames, square).shape == (2, 1, 3, 336, 336)


def test_ten_crops_mirror_after_cutting() -> None:
    shape = text4vis_geometry(60, 40, size=32, crops=10)
    assert [crop.flip for crop in shape.crops] == [False, True] * 5
    frame = np.random.default_rng(1).integers(0, 256, (1, 40, 60, 3), dtype=np.uint8)
    images = apply_pillow(frame, shape, crops=shape.crops)[0]
    assert torch.equal(images[1::2], images[::2].flip(-1))
    assert not torch.equal(images[1], images[0])


def test_a_frame_smaller_than_the_crop_is_padded_with_black() -> None:
    """Something-Something at 336 pixels: the fixed 320 x 240 frame does not fill the crop."""
    shape = PIPELINES["text4vis"].geometry(500, 400, DataConfig(resolution=336, something=True), 1)
    assert (shape.width, shape.height) == (320, 240)
    frame = np.full((1, 400, 500, 3), 200, dtype=np.uint8)
    image = apply_pillow(frame, shape)[0, 0].numpy()
    assert (image[:, 48:288, 8:328] == 200).all()
    assert image.sum() == 3 * 240 * 320 * 200
    outside = Geometry(width=4, height=4, size=4, crops=(Crop(-3, 2), Crop(2, -3, flip=True)))
    square = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3, axis=3)
    cut = apply_pillow(square, outside)[0, :, 0].tolist()
    assert cut[0] == [[0, 0, 0, 9], [0, 0, 0, 13], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert cut[1] == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 4, 3]]


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize(("width", "height"), [(24, 60), (60, 24), (24, 40)])
def test_the_passes_of_a_resize_have_pillow_13s_order(
    width: int, height: int, resample: Image.Resampling
) -> None:
    """Where a frame loses rows alone they come first; Pillow 12 begins with the columns."""
    frame = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = np.asarray(resize_image(Image.fromarray(frame), 30, 30, resample))
    kind: Resample = "bicubic" if resample == Image.Resampling.BICUBIC else "bilinear"
    expected = cut_crops_reference(
        torch.from_numpy(frame[None]), [(0, 0, False)], width=30, height=30, side=30, resample=kind
    )
    np.testing.assert_array_equal(found.transpose(2, 0, 1), expected[0, 0].numpy())


def test_padding_agrees_with_torchvision_for_odd_margins() -> None:
    from torchvision.transforms import CenterCrop

    for width, height in ((7, 5), (8, 9), (13, 6), (10, 10), (11, 14)):
        frame = np.random.default_rng(2).integers(1, 256, (height, width, 3), dtype=np.uint8)
        ours = text4vis_geometry(1, 1, size=9, crops=1, fixed=(width, height))
        expected = np.asarray(CenterCrop(9)(Image.fromarray(frame))).transpose(2, 0, 1)
        np.testing.assert_array_equal(apply_pillow(frame[None], ours)[0, 0].numpy(), expected)


def test_crop_counts_that_no_protocol_has() -> None:
    with pytest.raises(UserError, match="1, 3, 5 or 10 crops, got 4"):
        text4vis_geometry(320, 240, size=224, crops=4)
    with pytest.raises(UserError, match="1 or 3 crops, got 5"):
        evl_geometry(320, 240, size=224, crops=5)
