"""Frame samplers against the official codes' own draws, and the corners they leave undefined."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from kineticlip.config import DataConfig, ViewConfig
from kineticlip.data import sampling
from kineticlip.data.pipelines import PIPELINES
from kineticlip.runtime.errors import UserError

Mode = Literal["uniform", "dense"]

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT4VIS = dict(np.load(GOLDEN / "text4vis" / "sampler.npz"))
SEED_BASE = 1000  # sampler_seed_base of the golden set


def cases(prefix: str) -> list[str]:
    return sorted(key for key in TEXT4VIS if key.startswith(prefix))


def frames_of(key: str) -> int:
    return int(key.split("/")[1].removeprefix("T"))


@pytest.mark.parametrize("key", cases("test_"))
def test_text4vis_test_clips_match_the_official_ones(key: str) -> None:
    clips = int(key.split("/")[2].removeprefix("clips"))
    sampler = sampling.text4vis_dense_test if "dense" in key else sampling.text4vis_uniform_test
    for count, expected in zip(TEXT4VIS["n_frames"].tolist(), TEXT4VIS[key], strict=True):
        got = sampler(count, frames_of(key), clips)
        assert got.shape == (clips, frames_of(key))
        np.testing.assert_array_equal(got.ravel() + 1, expected, err_msg=f"{count} frames")


@pytest.mark.parametrize("key", cases("val_uniform"))
def test_one_uniform_clip_is_the_official_validation(key: str) -> None:
    for count, expected in zip(TEXT4VIS["n_frames"].tolist(), TEXT4VIS[key], strict=True):
        got = sampling.text4vis_uniform_test(count, frames_of(key), 1)[0]
        np.testing.assert_array_equal(got + 1, expected, err_msg=f"{count} frames")


@pytest.mark.parametrize(
    "key", [*cases("train_uniform"), *cases("train_dense"), *cases("val_dense")]
)
def test_text4vis_training_draws_match_the_official_ones(key: str) -> None:
    sampler = sampling.text4vis_dense_train if "dense" in key else sampling.text4vis_uniform_train
    for count, expected in zip(TEXT4VIS["n_frames"].tolist(), TEXT4VIS[key], strict=True):
        rng = np.random.RandomState(SEED_BASE + count)
        got = sampler(count, frames_of(key), rng)
        np.testing.assert_array_equal(got + 1, expected, err_msg=f"{count} frames")


def test_text4vis_training_leaves_the_stream_where_the_official_code_does() -> None:
    rng = np.random.RandomState(SEED_BASE)
    got = [sampling.text4vis_uniform_train(int(n), 8, rng) + 1 for n in TEXT4VIS["n_frames"]]
    np.testing.assert_array_equal(np.stack(got), TEXT4VIS["train_stream/T8"])


@pytest.mark.parametrize("num_frames", [4, 8, 16])
def test_bike_training_draws_match_the_official_ones(num_frames: int) -> None:
    golden = np.load(GOLDEN / "text4vis" / "bike_sampler.npz")
    base = int(golden["seed_base"])
    expected = golden[f"bike_train/T{num_frames}"]
    got = [
        sampling.bike_train(n, num_frames, random.Random(base + n))
        for n in golden["n_frames"].tolist()
    ]
    np.testing.assert_array_equal(np.stack(got) + 1, expected)


def test_evl_training_draws_match_the_official_ones() -> None:
    golden = json.loads((GOLDEN / "evl" / "samplers.json").read_text())["train"]
    assert {case["sampling_rate"] == -1 for case in golden} == {True, False}
    for case in golden:
        rng = np.random.RandomState(case["np_seed"])
        for expected in case["draws"]:
            if case["sampling_rate"] == -1:
                got = sampling.segment_train(case["video_len"], case["num_frames"], rng)
            else:
                got = sampling.strided_train(
                    case["video_len"], case["num_frames"], case["sampling_rate"], rng
                )
            assert got.tolist() == expected, case


def test_evl_test_clips_match_the_official_ones() -> None:
    for case in json.loads((GOLDEN / "evl" / "samplers.json").read_text())["test"]:
        got = sampling.strided_test(
            case["video_len"], case["num_frames"], case["sampling_rate"], case["num_temporal_views"]
        )
        assert got.tolist() == case["indices"], case


def test_vitaclip_samples_as_evl_does() -> None:
    golden = json.loads((GOLDEN / "vitaclip" / "data.json").read_text())
    for case in golden["train_frame_idx"]:
        rng = np.random.RandomState(case["np_seed"])
        count, num_frames, rate = case["len"], case["num_frames"], case["sampling_rate"]
        if rate == -1:
            got = sampling.segment_train(count, num_frames, rng)
        else:
            got = sampling.strided_train(count, num_frames, rate, rng)
        assert got.tolist() == case["idx"], case
    for case in golden["eval_frame_idx"]:
        views = sampling.strided_test(
            case["len"], case["num_frames"], case["sampling_rate"], case["views"]
        )
        assert views.tolist() == case["idx"], case


def test_dense_with_one_clip_starts_at_the_first_frame() -> None:
    got = sampling.text4vis_dense_test(300, 8, 1)
    assert got.tolist() == [[0, 16, 32, 48, 64, 80, 96, 112]]


def test_segment_midpoints() -> None:
    assert sampling.segment_test(80, 4, 1).tolist() == [[10, 30, 50, 70]]
    assert sampling.segment_test(80, 4, 2).tolist() == [[5, 25, 45, 65], [15, 35, 55, 75]]
    assert sampling.segment_test(3, 4, 1).tolist() == [[0, 1, 1, 2]]
    assert sampling.segment_test(1, 8, 3).tolist() == [[0] * 8] * 3


@pytest.mark.parametrize("pipeline", ["text4vis", "bike", "evl"])
@pytest.mark.parametrize("mode", ["uniform", "dense"])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 127, 128, 129, 1000])
def test_every_sampling_stays_inside_the_video(pipeline: str, mode: Mode, count: int) -> None:
    data = DataConfig(num_frames=8, sampling=mode, sampling_rate=16)
    for seed in range(5):
        got = PIPELINES[pipeline].sample_train(count, data, sampling.ClipRandom.seeded(seed))
        assert got.shape == (8,)
        assert got.dtype == np.int64
        assert 0 <= got.min() <= got.max() < count
    for clips in (1, 3):
        views = ViewConfig(clips=clips, sampling=mode)
        clip = PIPELINES[pipeline].sample_test(count, data, views)
        assert clip.shape == (clips, 8)
        assert clip.dtype == np.int64
        assert 0 <= clip.min() <= clip.max() < count


def test_pipelines_choose_different_samplers() -> None:
    def draw(pipeline: str, mode: Mode) -> list[int]:
        data = DataConfig(num_frames=4, sampling=mode, sampling_rate=3)
        rng = sampling.ClipRandom.seeded(3)
        return PIPELINES[pipeline].sample_train(400, data, rng).tolist()

    assert set(np.diff(draw("evl", "dense"))) == {3}
    assert draw("text4vis", "dense")[1] - draw("text4vis", "dense")[0] in (32, 32 - 400)
    assert len({tuple(draw(name, "uniform")) for name in ("text4vis", "bike", "evl")}) == 3


def test_seeded_generators_repeat_and_differ() -> None:
    def draws(*keys: int) -> tuple[float, float]:
        rng = sampling.ClipRandom.seeded(*keys)
        return rng.python.random(), float(rng.numpy.random_sample())

    assert draws(1, 2, 3) == draws(1, 2, 3)
    seen = {draws(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)}
    assert len(seen) == 8


def test_dense_span_limits_the_frames() -> None:
    data = DataConfig(num_frames=129, sampling="dense")
    with pytest.raises(UserError, match="at most 128 frames"):
        PIPELINES["text4vis"].sample_train(500, data, sampling.ClipRandom.seeded(0))
