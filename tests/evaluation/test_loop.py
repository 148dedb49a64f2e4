"""The evaluation loop: every video once, in order, each distinct image encoded once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kineticlip.commands.demo.clips import render_clip, write_clip
from kineticlip.config import Config, load_config
from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.data.entries import Entry
from kineticlip.data.pipelines import PIPELINES
from kineticlip.data.scoring_loader import ScoringLoader
from kineticlip.data.statistics import CLIP_STATISTICS
from kineticlip.evaluation import clock as timing
from kineticlip.evaluation import loop
from kineticlip.evaluation.clock import Clock
from kineticlip.evaluation.loop import Scored, score_stream
from kineticlip.evaluation.ready import ready
from kineticlip.methods import METHODS
from kineticlip.methods.method import Method
from kineticlip.video import plan_frames

NAMES = ("archery", "bowling", "cooking")
CPU = torch.device("cpu")
TINY = (
    "model.arch=ViT-tiny-16", "model.weights=random", "data.resolution=64", "data.num_frames=4",
    "eval.precision=fp32",
)  # fmt: skip


def configured(*pairs: str) -> Config:
    return load_config(None, [*TINY, *pairs])


def made_video(number: int, frames: int, *, clips: int = 2, crops: Sequence[int] = (0, 1, 0)):
    """A video of `frames` random frames; crop 2 shows the same pixels as crop 0."""
    config = configured(f"test.clips={clips}", "test.sampling=dense")
    sample = PIPELINES["text4vis"].sample_test
    plan = plan_frames(sample(frames, config.data, config.test))
    generator = torch.Generator().manual_seed(number)
    shape = (len(plan.frames), max(crops) + 1, 3, 64, 64)
    return VideoViews(
        name=f"video{number}",
        label=number % 3,
        images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        frame_index=torch.from_numpy(plan.index),
        crop_index=torch.tensor(crops),
        decoder="made",
        num_frames=frames,
    )


class CountingTower(nn.Module):
    """Means of the pixels as embeddings; counts the images it is shown."""

    def __init__(self, fails_above: int = 10**9) -> None:
        super().__init__()
        self.visual = nn.Identity()
        self.images, self.largest, self.fails_above = 0, 0, fails_above

    def encode(self, images: Tensor) -> Tensor:
        if len(images) > self.fails_above:
            raise torch.OutOfMemoryError("made up")
        self.images += len(images)
        self.largest = max(self.largest, len(images))
        return images.float().mean(dim=(2, 3)) / 255  # [M, 3]


def count_score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    assert isinstance(model, CountingTower)
    rows = []
    for video in videos:
        images = video.images.flatten(0, 1)
        encoded = torch.cat([model.encode(part) for part in images.split(chunk)])
        rows.append(encoded.mean(dim=0))
    return torch.stack(rows)


COUNTING = Method(
    build=lambda config, names: CountingTower(),
    loss=lambda model, batch: (torch.zeros(()), {}),
    score=count_score,
    param_groups=lambda model, config: [],
    cost=lambda config, model, classes: [],
)


def test_videos_come_out_in_order_with_bad_ones_in_their_place() -> None:
    bad = BadVideo("broken.mp4", 0, "no video stream")
    stream = [made_video(0, 9), bad, made_video(1, 30), made_video(2, 5), bad]
    model = CountingTower()
    clock = Clock()
    results = list(score_stream(model, COUNTING, stream, device=CPU, chunk=8, clock=clock))
    names = [item.name if isinstance(item, BadVideo) else item.video.name for item in results]
    assert names == ["video0", "broken.mp4", "video1", "video2", "broken.mp4"]
    for item, video in zip(results, stream, strict=True):
        if isinstance(item, Scored):
            assert isinstance(video, VideoViews)
            expected = video.images.float().mean(dim=(0, 1, 3, 4)) / 255
            torch.testing.assert_close(item.scores, expected)
            assert not item.video.images.numel()  # pixels are not kept
    assert clock.videos == 3
    assert (
        clock.images
        == model.images
        == sum(
            video.images.shape[0] * video.images.shape[1]
            for video in stream
            if isinstance(video, VideoViews)
        )
    )


def test_running_out_of_memory_halves_the_chunk_and_loses_no_video() -> None:
    stream = [made_video(number, 20) for number in range(4)]
    model = CountingTower(fails_above=5)
    clock = Clock()
    results = list(score_stream(model, COUNTING, stream, device=CPU, chunk=16, clock=clock))
    assert [item.video.name for item in results if isinstance(item, Scored)] == [
        video.name for video in stream
    ]
    assert clock.halvings == 2 and model.largest <= 4


def test_a_group_that_does_not_fit_on_the_device_is_scored_by_halves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device that holds the pixels of two videos at a time, whatever the chunk."""
    method, tower = COUNTING, CountingTower()
    held: list[weakref.ref[VideoViews]] = []

    def upload(video: VideoViews) -> VideoViews:
        held[:] = [seen for seen in held if seen() is not None]
        if len(held) == 2:
            raise torch.OutOfMemoryError("made up")
        moved = replace(video)
        held.append(weakref.ref(moved))
        return moved

    monkeypatch.setattr(loop, "_uploader", lambda device: upload)
    videos = [made_video(number, 12) for number in range(7)]
    clock = Clock()
    results = list(score_stream(tower, method, videos, device=CPU, chunk=500, clock=clock))
    assert len(results) == len(videos)
    monkeypatch.undo()
    plain = list(score_stream(tower, method, videos, device=CPU, chunk=500))
    for video, item, other in zip(videos, results, plain, strict=True):
        assert isinstance(item, Scored) and isinstance(other, Scored)
        assert item.video.name == video.name
        torch.testing.assert_close(item.scores, other.scores, rtol=1e-6, atol=1e-6)
    assert clock.halvings > 0


def test_the_model_is_timed_on_a_full_group_or_on_one_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[int] = []

    def ceiling(
        model: nn.Module, method: Method, videos: list[VideoViews], chunk: int, *, seconds: float
    ) -> float:
        timed.append(sum(len(video.images.flatten(0, 1)) for video in videos))
        return 100.0

    monkeypatch.setattr(timing, "measure_ceiling", ceiling)
    full = made_video(0, 12)
    images, view = len(full.images.flatten(0, 1)), len(full.frame_index[0].unique())
    small = replace(full, images=full.images[:4, :1], frame_index=torch.arange(4)[None])
    small = replace(small, crop_index=torch.zeros(1, dtype=torch.int64))
    for limit, elapsed, expected in ((1e9, 10.0, images), (0.0, 1e9, view), (0.0, 0.0, None)):
        monkeypatch.setattr(timing, "CEILING_LIMIT", limit)
        clock = Clock()
        videos = [full, full, small]
        list(score_stream(CountingTower(), COUNTING, videos, device=CPU, chunk=images,
                          clock=clock))  # fmt: skip
        clock.waits["compute"] = 1.0
        clock.ended = clock.started + elapsed
        timed.clear()
        timing.time_the_model(CountingTower(), COUNTING, clock)
        assert timed == ([] if expected is None else [expected])
        assert clock.speed().model_images_per_second == (None if expected is None else 100.0)


@pytest.mark.parametrize("crops", [1, 3])
def test_twenty_frames_in_ten_dense_clips_are_encoded_once_a_crop(
    tmp_path: Path, crops: int
) -> None:
    frames = render_clip(0, 0, np.random.default_rng(0))
    write_clip(tmp_path / "short.mp4", frames[np.arange(20) % len(frames)])
    views = ("test.clips=10", "test.sampling=dense", f"test.crops={crops}", "data.num_frames=8")
    config = configured(*views, "classifier.source=random_normal")
    model = ready(METHODS["text4vis"].build(config, NAMES), config, device=CPU).model
    shown: list[int] = []
    model.get_submodule("visual").register_forward_pre_hook(
        lambda _, given: shown.append(len(given[0]))
    )
    entry = Entry("short", str(tmp_path / "short.mp4"), 0)
    loader = ScoringLoader([entry], config, statistics=CLIP_STATISTICS)
    (item,) = score_stream(model, METHODS["text4vis"], loader, device=CPU, chunk=16)
    assert isinstance(item, Scored)
    assert (item.video.num_frames, item.video.num_views) == (20, 10 * crops)
    assert 0 < sum(shown) <= 20 * crops  # one at a time would be 80 * crops


@pytest.mark.parametrize("header", ["mean", "transformer"])
def test_scores_equal_the_naive_order_of_work(header: str) -> None:
    config = configured(f"text4vis.header={header}", "text4vis.header_layers=2")
    method = METHODS["text4vis"]
    model: Any = ready(method.build(config, NAMES), config, device=CPU).model
    videos = [made_video(number, frames) for number, frames in enumerate((6, 40, 9))]
    fast = list(score_stream(model, method, videos, device=CPU, chunk=7))
    for item, video in zip(fast, videos, strict=True):
        assert isinstance(item, Scored)
        with torch.inference_mode():
            views = torch.stack([model.encode_clips(clip[None])[0] for clip in video.clips()])
            cosine = nn.functional.normalize(views.mean(dim=0), dim=-1) @ model.classifier.T
        torch.testing.assert_close(item.scores, (100 * cosine).softmax(dim=-1), atol=1e-6, rtol=0)


def test_scores_of_a_trunk_in_bf16_are_fp32_probabilities() -> None:
    config = configured("eval.precision=bf16")
    method = METHODS["text4vis"]
    model = ready(method.build(config, NAMES), config, device=CPU, packed=False).model
    item = next(score_stream(model, method, [made_video(0, 9)], device=CPU, chunk=9))
    assert isinstance(item, Scored)
    assert item.scores.dtype == torch.float32 and item.scores.sum() == pytest.approx(1, abs=1e-5)


def test_clock_shares_are_percentages_of_the_run() -> None:
    clock = Clock()
    with clock.waiting_for("decode"):
        sum(range(100_000))
    speed = clock.speed(tower="fp32 on cpu", decoding="no GPU")
    assert 0 < speed.decode_percent <= 100
    assert speed.transfer_percent == speed.compute_percent == 0
    assert (speed.tower, speed.decoding, speed.processes) == ("fp32 on cpu", "no GPU", None)
