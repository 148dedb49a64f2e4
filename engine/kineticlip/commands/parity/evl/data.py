"""Replays EVL's data pipeline: which frames, which crops, which pixels, in what order.

`pts_order` of dataset.json is not replayed: it feeds a stub decoder packets out of order, and
real ones hand frames out in display order (tests/video).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.config import DataConfig, ViewConfig
from kineticlip.data.augment import apply_evl, draw_evl_box
from kineticlip.data.batch import VideoViews
from kineticlip.data.order import TrainingOrder
from kineticlip.data.pipelines import PIPELINES
from kineticlip.data.randaugment import EVL_STYLE, Step, apply_steps, draw_evl
from kineticlip.data.sampling import ClipRandom
from kineticlip.data.statistics import PixelStatistics
from kineticlip.data.views import apply_tensor, evl_boxes, evl_geometry

Case = Mapping[str, Any]
SAMPLE_TRAIN = PIPELINES["evl"].sample_train
AUGMENTED = 0.05  # the pixels of Pillow's operations depend on its version
# Elsewhere PyTorch's resize may round the last bit of values up to 2 differently.
PIXELS = 0.0 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else 2.4e-7


def checks(folder: Path) -> Iterator[Check]:
    """samplers.json, train_loader_order.json, dataset.json and dataset.npz."""
    yield from _samplers(json.loads((folder / "samplers.json").read_text()))
    for number, case in enumerate(json.loads((folder / "train_loader_order.json").read_text())):
        yield exactly(f"order {number}: clips of a rank", _order(case), case["indices"])
    cases = json.loads((folder / "dataset.json").read_text())
    with np.load(folder / "dataset.npz") as archive:
        arrays = dict(archive)
    for case in cases["tests"]:
        expected = torch.from_numpy(arrays[case["key"]])  # [views, 3, T, S, S]
        views = _test_views(case, arrays[f"frames.{case['video']}"], cases)
        yield compare(f"dataset {case['key']}", views, expected, atol=PIXELS)
    for case in cases["trains"]:
        frames = arrays[f"frames.{case['video']}"]
        yield from _train_clip(case, frames, arrays[case["key"]], cases)


def _data(case: Case) -> DataConfig:
    """The settings that a recorded case means; a rate of -1 is segment (TSN) sampling."""
    dense = case["sampling_rate"] > 0
    return DataConfig(
        num_frames=case["num_frames"],
        sampling="dense" if dense else "uniform",
        sampling_rate=case["sampling_rate"] if dense else 1,
    )


def _seeded(seed: int) -> ClipRandom:
    """The generators as `random.seed(seed)` and `np.random.seed(seed)` leave them."""
    return ClipRandom(random.Random(seed), np.random.RandomState(seed))


def _samplers(cases: Mapping[str, list[Case]]) -> Iterator[Check]:
    for number, case in enumerate(cases["train"]):
        rng = _seeded(case["np_seed"])
        draws = [SAMPLE_TRAIN(case["video_len"], _data(case), rng).tolist() for _ in case["draws"]]
        yield exactly(f"samplers train {number}", draws, case["draws"])
    for number, case in enumerate(cases["test"]):
        clips = _test_clips(case, case["video_len"])
        yield exactly(f"samplers test {number}", clips.tolist(), case["indices"])
    for number, case in enumerate(cases["resize"]):
        shape = evl_geometry(case["w"], case["h"], size=case["spatial_size"], crops=1)
        yield exactly(f"samplers resize {number}", [shape.height, shape.width], case["resized"])
    for number, case in enumerate(cases["crops"]):
        size, crops = case["spatial_size"], case["num_spatial_views"]
        cut = evl_boxes(case["w"], case["h"], size=size, crops=crops)
        boxes = [[box.y, box.x, box.y + size, box.x + size] for box in cut]
        yield exactly(f"samplers crops {number}", boxes, case["boxes_top_left_bottom_right"])


def _test_clips(case: Case, count: int) -> NDArray[np.int64]:
    views = ViewConfig(clips=case["num_temporal_views"], sampling="dense")
    return PIPELINES["evl"].sample_test(count, _data(case), views)


def _order(case: Case) -> list[int]:
    """The indices of one rank; a batch of the official code is a micro-batch of every rank."""
    order = TrainingOrder(
        length=case["dataset_len"],
        seed=0,
        size=case["batch_size"] // case["world_size"],
        rank=case["rank"],
        world=case["world_size"],
    )
    numbers = range(case["resume_step"], case["num_steps"])
    return [order.locate(place)[1] for number in numbers for place in order.places(number)]


def _test_views(case: Case, frames: NDArray[np.uint8], pixels: Case) -> torch.Tensor:
    """[views, 3, T, S, S], spatial-major; each distinct frame is cut once."""
    size, crops = case["spatial_size"], case["num_spatial_views"]
    indices = _test_clips(case, len(frames))
    numbers, index = np.unique(indices, return_inverse=True)
    shape = evl_geometry(frames.shape[2], frames.shape[1], size=size, crops=crops)
    images = apply_tensor(
        frames[numbers],
        shape,
        numbers=numbers.tolist(),
        count=len(frames),
        statistics=_statistics(pixels),
    )
    video = VideoViews(
        name=case["key"],
        label=0,
        images=images,
        frame_index=torch.from_numpy(index.reshape(indices.shape)),
        crop_index=torch.from_numpy(shape.distinct()[1]),
        decoder="recorded",
        num_frames=len(frames),
    )
    return video.clips().transpose(1, 2)


def _statistics(pixels: Case) -> PixelStatistics:
    return PixelStatistics(mean=tuple(pixels["mean"]), std=tuple(pixels["std"]))


def _train_clip(
    case: Case, frames: NDArray[np.uint8], expected: NDArray[np.float32], pixels: Case
) -> Iterator[Check]:
    """Draws in the official order: frames, RandAugment, box."""
    name, rng = f"dataset {case['key']}", _seeded(case["seed"])
    indices = SAMPLE_TRAIN(len(frames), _data(case), rng)
    yield exactly(f"{name}: frames", indices.tolist(), case["frame_idx"])
    clip, steps = frames[indices], _steps(case["auto_augment"], rng)
    drawn = [{"applied": False} if step is None else _recorded(step) for step in steps]
    wanted = [op if op["applied"] else {"applied": False} for op in case["aug_ops"]]
    yield exactly(f"{name}: operations", drawn, wanted)
    if applied := [step for step in steps if step is not None]:
        images = (apply_steps(Image.fromarray(frame), applied, EVL_STYLE) for frame in clip)
        clip = np.stack([np.asarray(image) for image in images])
    box = draw_evl_box(frames.shape[2], frames.shape[1], rng)
    yield exactly(f"{name}: box", [box.y, box.x, box.height, box.width], case["crop_ijhw"])
    made = apply_evl(clip, box, case["spatial_size"], statistics=_statistics(pixels))
    atol = AUGMENTED if applied else PIXELS
    yield compare(f"{name}: pixels", made.transpose(0, 1), expected, atol=atol)


def _steps(recipe: str | None, rng: ClipRandom) -> list[Step | None]:
    """The operations of a recipe such as rand-m7-n4-mstd0.5-inc1, drawn."""
    if not recipe:
        return []
    words = dict(re.findall(r"-(mstd|m|n|inc)([\d.]+)", recipe))
    return draw_evl(
        rng,
        count=int(words["n"]),
        magnitude=float(words["m"]),
        spread=float(words["mstd"]),
        increasing="inc" in words,  # whatever its number: the official code reads it as text
    )


def _recorded(step: Step) -> dict[str, Any]:
    values = {"args": list(step.values)} if step.values else {}
    return {"op": step.name, "applied": True, **values}
