"""Frames, pixels, lists and sentences: what the official code chose, cut, drew and tokenised."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.commands.parity.text4vis.files import SUMS, Golden
from kineticlip.config import DataConfig, ViewConfig
from kineticlip.data.few_shot import few_shot
from kineticlip.data.lists import read_list
from kineticlip.data.pipelines import PIPELINES, training_pixels
from kineticlip.data.sampling import ClipRandom
from kineticlip.data.statistics import CLIP_STATISTICS
from kineticlip.data.views import apply_pillow, resize_pillow, text4vis_geometry
from kineticlip.models.prompts import render
from kineticlip.models.text import tokenize
from kineticlip.runtime.errors import UserError

Sampling = Literal["uniform", "dense"]


def seeded(seed: int) -> ClipRandom:
    """The two generators as `random.seed(seed)` and `np.random.seed(seed)` leave them."""
    return ClipRandom(random.Random(seed), np.random.RandomState(seed))


def sampler_checks(golden: Golden) -> Iterator[Check]:
    """Text4Vis's test, validation and training samplers, 1-based, over many frame counts."""
    recorded, log = golden.arrays("sampler"), golden.json("misc_log")
    counts, base = recorded.pop("n_frames").tolist(), log["sampler_seed_base"]
    for key, expected in recorded.items():
        kind, length, clips = _sampler_key(key)
        if kind == "train_stream":
            stream = seeded(base)
            rows = [_train("uniform", length, count, stream) for count in counts]
        elif kind in ("train_uniform", "train_dense", "val_dense"):  # this validation is random
            rows = [_train(_mode(kind), length, count, seeded(base + count)) for count in counts]
        else:
            rows = [_test(_mode(kind), length, count, clips) for count in counts]
        yield exactly(f"sampler/{key}", np.stack(rows) + 1, expected)
    for key in log["sampler_errors"]:  # one dense clip: ours begins with the video
        kind, length, clips = _sampler_key(key)
        first = [int(_test(_mode(kind), length, count, clips)[0]) for count in counts]
        yield exactly(f"sampler/{key} starts at 0", first, [0] * len(counts))


def _sampler_key(key: str) -> tuple[str, int, int]:
    """`test_dense/T8/clips3` -> kind, frames of a clip, clips (1 where none are named)."""
    match = re.fullmatch(r"(\w+)/T(\d+)(?:/clips(\d+))?", key)
    if match is None:
        raise UserError(f"sampler.npz: '{key}' names no sampler")
    return match[1], int(match[2]), int(match[3] or 1)


def _mode(kind: str) -> Sampling:
    return "dense" if kind.endswith("dense") else "uniform"


def _train(mode: Sampling, length: int, count: int, rng: ClipRandom) -> NDArray[np.int64]:
    data = DataConfig(num_frames=length, sampling=mode)
    return PIPELINES["text4vis"].sample_train(count, data, rng)


def _test(mode: Sampling, length: int, count: int, clips: int) -> NDArray[np.int64]:
    data, views = DataConfig(num_frames=length), ViewConfig(clips=clips, sampling=mode)
    return PIPELINES["text4vis"].sample_test(count, data, views).ravel()


def bike_sampler_checks(golden: Golden) -> Iterator[Check]:
    """BIKE's training sampler."""
    recorded = golden.arrays("bike_sampler")
    counts, base = recorded.pop("n_frames").tolist(), int(recorded.pop("seed_base"))
    for key, expected in recorded.items():
        data = DataConfig(num_frames=_sampler_key(key)[1])
        draw = PIPELINES["bike"].sample_train
        rows = [draw(count, data, seeded(base + count)) for count in counts]
        yield exactly(f"bike_sampler/{key}", np.stack(rows) + 1, expected)


def crop_checks(golden: Golden) -> Iterator[Check]:
    """Resized frames and 1, 3, 5 and 10 crops of a frame and its negative, crop-major."""
    recorded, sources = golden.arrays("crops"), golden.arrays("crops_src")
    for prefix in sorted({"/".join(key.split("/")[:2]) for key in recorded}):
        source, side = prefix.split("/")
        size, frame = int(side.removeprefix("in")), sources[f"src_{source}"]
        height, width = frame.shape[:2]
        shape = text4vis_geometry(width, height, size=size, crops=1)
        resized = resize_pillow(frame, shape.width, shape.height)
        rows, columns = (np.linspace(0, n - 1, 12).astype(int) for n in resized.shape[:2])
        for name, found in {
            "resized_wh": np.array([shape.width, shape.height]),
            "resized_sum": resized.sum((0, 1), dtype=np.int64),
            "resized_grid_u8": resized[rows][:, columns],
        }.items():
            yield exactly(f"crops/{prefix}/{name}", found, recorded[f"{prefix}/{name}"])
        counts = re.findall(rf"{re.escape(prefix)}/crops(\d+)/grid_u8\b", "\n".join(recorded))
        for count in map(int, counts):
            yield from _crops(recorded, f"{prefix}/crops{count}", frame, size, count)


def _crops(
    recorded: dict[str, NDArray[Any]], prefix: str, frame: NDArray[Any], size: int, count: int
) -> Iterator[Check]:
    shape = text4vis_geometry(frame.shape[1], frame.shape[0], size=size, crops=count)
    images = apply_pillow(np.stack([frame, 255 - frame]), shape, crops=shape.crops)
    crops = images.transpose(0, 1).flatten(0, 1)  # [crops * 2, 3, S, S]
    pixels = _normalised(crops)
    grid = np.linspace(0, size - 1, recorded[f"{prefix}/grid_u8"].shape[-1]).astype(int)
    shown = crops.numpy()[:, :, grid][..., grid]
    yield exactly(f"crops/{prefix}/grid", shown, recorded[f"{prefix}/grid_u8"])
    first = pixels[0].numpy()[:, grid][..., grid]
    expected = recorded[f"{prefix}/grid_norm_first"]
    yield compare(f"crops/{prefix}/normalised", first, expected, atol=1e-6)
    sums = pixels.double().sum((2, 3))
    yield compare(f"crops/{prefix}/sum", sums, recorded[f"{prefix}/sum"], atol=SUMS)
    sums = pixels.double().abs().sum((2, 3))
    yield compare(f"crops/{prefix}/absum", sums, recorded[f"{prefix}/absum"], atol=SUMS)
    if f"{prefix}/full_u8_frame0" in recorded:
        whole = recorded[f"{prefix}/full_u8_frame0"]
        yield exactly(f"crops/{prefix}/full", crops[0], whole)


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    clip = CLIP_STATISTICS
    mean, std = torch.tensor(clip.mean).view(3, 1, 1), torch.tensor(clip.std).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


def augmentation_checks(golden: Golden) -> Iterator[Check]:
    """Training pixels of seeded draws, and the label that a mirrored clip gets."""
    recorded, sources = golden.arrays("train_aug"), golden.arrays("crops_src")
    for prefix in sorted({key.rpartition("/")[0] for key in recorded}):
        source, side, seed = prefix.split("/")
        something = source.startswith("something_")
        size = int(side.removeprefix("in"))
        frame = sources[f"src_{source.removeprefix('something_')}"]
        data = DataConfig(resolution=size, something=something, augmentation="released")
        pixels, label = training_pixels(
            PIPELINES["text4vis"],
            np.stack([frame, 255 - frame]),
            86,  # of Something-Something: mirrored it is 87
            data,
            rng=seeded(int(seed.removeprefix("seed"))),
            statistics=CLIP_STATISTICS,
        )
        expected = recorded[f"{prefix}/grid_u8"]
        grid = np.linspace(0, size - 1, expected.shape[-1]).astype(int)
        shown = pixels.numpy()[:, :, grid][..., grid]
        yield exactly(f"augmentation/{prefix}/grid", shown, expected)
        if f"{prefix}/sum" in recorded:
            sums = _normalised(pixels).double().sum((2, 3))
            yield compare(f"augmentation/{prefix}/sum", sums, recorded[f"{prefix}/sum"], atol=SUMS)
        if f"{prefix}/label_from86" in recorded:
            expected = recorded[f"{prefix}/label_from86"]
            yield exactly(f"augmentation/{prefix}/label", np.array(label), expected)


def few_shot_checks(golden: Golden) -> Iterator[Check]:
    """The K-shot subsets of seeded generators, and how often an epoch repeats them."""
    recorded = golden.json("fewshot")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        path.write_text("".join(f"{line}\n" for line in recorded["list_file"]))
        entries = read_list(path, min_frames=8).entries
    for key, run in recorded["runs"].items():
        match = re.fullmatch(r"K(\d+)_seed(\d+)", key)
        if match is None:
            raise UserError(f"fewshot.json: '{key}' is no run")
        shots, seed = map(int, match.groups())
        once = [entry.name for entry in few_shot(entries, shots, seed, repeat=False)]
        names = [entry.name for entry in few_shot(entries, shots, seed)]
        first = run["first_after_repeat"]
        for what, found, expected in (
            ("total", len(entries), run["total_after_min8_filter"]),
            ("selected", once, [line.split()[0] for line in run["selected"]]),
            ("repeats", len(names) // len(once), run["n_repeat"]),
            ("length", len(names), run["final_len"]),
            ("order", names[: len(first)], [line.split()[0] for line in first]),
        ):
            yield exactly(f"fewshot/{key}/{what}", found, expected)


def token_checks(golden: Golden) -> Iterator[Check]:
    """Token rows of prompts, of difficult texts, and of one that is too long."""
    recorded = golden.json("tokens")
    context = len(recorded["tokens"][0])
    prompts = render(recorded["template"], recorded["class_names"])
    long = [recorded["long_text"]]
    for what, found, expected in (
        ("prompts", tokenize(prompts, context), recorded["tokens"]),
        ("stress", tokenize(recorded["stress"], context), recorded["stress_tokens"]),
        ("truncated", tokenize(long, context, truncate=True), recorded["long_truncated"]),
    ):
        yield exactly(f"tokens/{what}", found, np.array(expected))
    try:
        tokenize(long, context)
        refused = False
    except UserError:
        refused = True
    yield exactly("tokens/too long is refused", refused, True)
