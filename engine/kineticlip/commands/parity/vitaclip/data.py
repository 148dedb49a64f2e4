"""The official Vita-CLIP data pipeline, replayed: frame choice, crops, augmentation, order, BPE."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.config import Config, OptimConfig, TrainConfig
from kineticlip.data.augment import apply_evl, augment_evl, draw_evl_box
from kineticlip.data.batch import VideoViews
from kineticlip.data.entries import Entry
from kineticlip.data.order import order_of
from kineticlip.data.randaugment import EVL_STYLE, draw_evl
from kineticlip.data.sampling import ClipRandom, segment_train, strided_test, strided_train
from kineticlip.data.scoring_loader import ScoringLoader
from kineticlip.data.statistics import CLIP_STATISTICS
from kineticlip.data.views import apply_tensor, evl_boxes, evl_geometry
from kineticlip.methods.prompts_text import clean
from kineticlip.models.text import tokenizer
from kineticlip.training.optim import rate_factor
from kineticlip.video import plan_frames

LAST_BIT = 5e-7  # two builds of PyTorch may fuse a multiplication and an addition, or not
RATE = 4  # the frame stride of the recorded pixels
AUGMENTED = 0.05  # RandAugment's pixels depend on Pillow's version


def data_checks(folder: Path) -> Iterator[Check]:
    """Every comparison of data.json and data.npz."""
    recorded = json.loads((folder / "data.json").read_text())
    with np.load(folder / "data.npz") as archive:
        arrays = dict(archive)
    yield from _samplers(recorded)
    yield from _geometry(recorded)
    yield from _randaugment(recorded)
    yield from _orders(recorded)
    yield from _rates(recorded)
    yield from _bpe(recorded)
    yield from _pixels(arrays)


def _seeded(seed: int) -> ClipRandom:
    return ClipRandom(random.Random(seed), np.random.RandomState(seed))


def _samplers(recorded: dict[str, Any]) -> Iterator[Check]:
    found, want = [], []
    for case in recorded["train_frame_idx"]:
        rng, rate = np.random.RandomState(case["np_seed"]), case["sampling_rate"]
        count, frames = case["len"], case["num_frames"]
        draw = segment_train(count, frames, rng) if rate == -1 else None
        found.append((strided_train(count, frames, rate, rng) if draw is None else draw).tolist())
        want.append(case["idx"])
    yield exactly("data train frames", found, want)
    cases = recorded["eval_frame_idx"]
    got = [
        strided_test(c["len"], c["num_frames"], c["sampling_rate"], c["views"]).tolist()
        for c in cases
    ]
    yield exactly("data test frames", got, [c["idx"] for c in cases])


def _geometry(recorded: dict[str, Any]) -> Iterator[Check]:
    cases = recorded["spatial_crops"]
    got = [
        [[b.y, b.x] for b in evl_boxes(c["w"], c["h"], size=c["size"], crops=c["views"])]
        for c in cases
    ]
    yield exactly("data spatial crops", got, [c["top_left"] for c in cases])
    cases = recorded["random_resized_crop"]
    boxes = [draw_evl_box(c["w"], c["h"], _seeded(c["seed"])) for c in cases]
    found = [[b.y, b.x, b.height, b.width] for b in boxes]
    yield exactly("data random crops", found, [c["ijhw"] for c in cases])


def _randaugment(recorded: dict[str, Any]) -> Iterator[Check]:
    for case in recorded["randaug"]:
        rng = _seeded(case["seed"])
        strided_train(10**6, 2, RATE, rng.numpy)  # the frame is drawn first from the same stream
        found = [step and (step.name, list(step.values)) for step in draw_evl(rng)]
        want = [
            (_operation(op["op"]), op["level_args"]) if op["applied"] else None
            for op in case["ops"]
        ]
        yield exactly(f"data RandAugment {case['seed']}", found, want)
        styles = [(op["resample"], op["fillcolor"]) for op in case["ops"] if op["applied"]]
        ours = (int(EVL_STYLE.resample), list(EVL_STYLE.fill))
        yield exactly(f"data RandAugment {case['seed']} style", [ours] * len(styles), styles)


def _operation(name: str) -> str:
    """`SolarizeIncreasing` -> `solarize`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removesuffix("Increasing")).lower()


def _orders(recorded: dict[str, Any]) -> Iterator[Check]:
    for number, case in enumerate(recorded["step_sampler"]):
        entries = [Entry(str(index), str(index), 0) for index in range(case["n"])]
        config = Config(seed=0, train=TrainConfig(micro_batch_size=case["per_gpu"]))
        place = {"rank": case["rank"], "world": case["world"]}
        order = order_of(entries, config, **place)
        steps = range(case["resume_step"], case["num_steps"])
        found = [order.locate(at)[1] for step in steps for at in order.places(step)]
        yield exactly(f"data order {number}", found, case["indices"])
        yield exactly(f"data order {number} length", len(steps), case["loader_len"])
        loader = ScoringLoader(entries, config, statistics=CLIP_STATISTICS, pipeline="evl", **place)
        tested = [int(entry.name) for entry in loader.entries]
        yield exactly(f"data order {number} test", tested, case["val_indices"])


def _rates(recorded: dict[str, Any]) -> Iterator[Check]:
    case = recorded["cosine_lr"]
    options = OptimConfig(lr=case["lr"], warmup_epochs=0, schedule="cosine")
    used = case["lr_used_at_step"]
    found = [case["lr"] * rate_factor(int(step), options, epochs=case["T_max"]) for step in used]
    yield compare("data cosine rates", found, list(used.values()), atol=1e-12)


def _bpe(recorded: dict[str, Any]) -> Iterator[Check]:
    encode = tokenizer().encode
    for data, ids in recorded["bpe_class_ids"].items():
        found = {name: encode(clean(name)) for name in ids}
        yield exactly(f"data BPE {data}", found, ids)
    texts = recorded["bpe_misc"]
    yield exactly("data BPE texts", {text: encode(text) for text in texts}, texts)
    values = recorded["u8_roundtrip_topil"]
    bytes_ = torch.tensor(range(256), dtype=torch.uint8)  # Pillow gets the bytes themselves here
    yield exactly("data bytes to Pillow", bytes_[: len(values)].tolist(), values)


def _pixels(arrays: dict[str, NDArray[Any]]) -> Iterator[Check]:
    frames = _presented(arrays)
    for name, want in arrays.items():
        views = re.fullmatch(r"eval_views_(\d)x(\d+)", name)
        clip = re.fullmatch(r"train_(noaug|aug)_seed(\d+)", name)
        count, size = want.shape[-3:-1] if want.ndim > 3 else (0, 0)
        if views:
            found = _views(frames, int(views[1]), int(views[2]), count, size)
            yield compare(f"data {name}", found, want, atol=LAST_BIT)
        elif clip:
            rng = _seeded(int(clip[2]))
            chosen = frames[strided_train(len(frames), count, RATE, rng.numpy)]
            if clip[1] == "aug":
                pixels = augment_evl(chosen, size, rng, statistics=CLIP_STATISTICS)
            else:
                box = draw_evl_box(frames.shape[2], frames.shape[1], rng)
                pixels = apply_evl(chosen, box, size, statistics=CLIP_STATISTICS)
            atol = AUGMENTED if clip[1] == "aug" else LAST_BIT
            yield compare(f"data {name}", pixels.transpose(0, 1), want, atol=atol)


def _presented(arrays: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """The recorded container's frames by time stamp, the later of two with the same one."""
    shown: dict[int, NDArray[np.uint8]] = {}
    for index, stamp, inverted in zip(
        arrays["decode_order"], arrays["decode_pts"], arrays["dup_is_inverted"], strict=True
    ):
        frame = arrays["video_u8"][index]
        shown[int(stamp)] = 255 - frame if inverted else frame
    return np.stack([shown[stamp] for stamp in sorted(shown)])


def _views(
    frames: NDArray[np.uint8], crops: int, clips: int, count: int, size: int
) -> torch.Tensor:
    """All views as the test loader cuts them: [crops * clips, 3, T, S, S]."""
    plan = plan_frames(strided_test(len(frames), count, RATE, clips))
    shape = evl_geometry(frames.shape[2], frames.shape[1], size=size, crops=crops)
    numbers = list(plan.frames)
    views = VideoViews(
        name="",
        label=0,
        images=apply_tensor(
            frames[numbers],
            shape,
            statistics=CLIP_STATISTICS,
            numbers=numbers,
            count=len(frames),
        ),
        frame_index=torch.from_numpy(plan.index),
        crop_index=torch.from_numpy(shape.distinct()[1]),
        decoder="none",
        num_frames=len(frames),
    )
    return views.clips().transpose(1, 2)
