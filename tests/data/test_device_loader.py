"""The GPU's way from files to views, run on the CPU: the same bytes as the threads' way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from kineticlip.commands.demo.clips import render_clip, write_clip
from kineticlip.config import load_config
from kineticlip.data import device_loader, scoring_loader
from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.data.device_loader import NO_ROOM, why_not_on_device
from kineticlip.data.entries import Entry
from kineticlip.data.statistics import CLIP_STATISTICS, PixelStatistics
from kineticlip.video import VideoError
from kineticlip.video.batch_reader import BatchReader, Decoded, Request

CPU = torch.device("cpu")
DeviceLoader = partial(device_loader.DeviceLoader, statistics=CLIP_STATISTICS)
ScoringLoader = partial(scoring_loader.ScoringLoader, statistics=CLIP_STATISTICS)
SETTINGS = ["data.resolution=48", "data.num_frames=3", "test.clips=2", "test.crops=3"]


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    root = tmp_path_factory.mktemp("clips")
    paths = [root / f"{number}.mp4" for number in range(3)]
    for number, path in enumerate(paths):
        write_clip(path, render_clip(number, number, np.random.default_rng(number)))
    (root / "broken.mp4").write_text("not a video")
    paths.insert(1, root / "broken.mp4")
    paths.append(root / "absent.mp4")
    return [Entry(path.name, str(path), number) for number, path in enumerate(paths)]


@pytest.mark.parametrize("pipeline", ["text4vis", "bike", "evl"])
def test_views_equal_those_of_the_threads(entries: list[Entry], pipeline: str) -> None:
    config = load_config(None, SETTINGS)
    other = PixelStatistics(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.125))
    rules: dict[str, Any] = {"pipeline": pipeline, "statistics": other}
    loader = DeviceLoader(entries, config, device=CPU, **rules)
    there = list(loader)
    here = list(ScoringLoader(entries, config, **rules))
    assert len(there) == len(here) == len(loader) == 5
    for a, b in zip(there, here, strict=True):
        if isinstance(b, BadVideo):
            assert a == b
            continue
        assert isinstance(a, VideoViews) and isinstance(b, VideoViews)
        assert torch.equal(a.images, b.images)
        assert a.statistics == b.statistics == other
        assert torch.equal(a.frame_index, b.frame_index)
        assert torch.equal(a.crop_index, b.crop_index)
        assert (a.name, a.label, a.num_frames) == (b.name, b.label, b.num_frames)
    assert loader.choice.startswith("pyav: ")


@pytest.mark.parametrize(
    ("pairs", "device", "reason"),
    [
        ((), "cpu", "no GPU"),
        (("data.decoder=pyav",), "cuda", "data.decoder=pyav"),
        (("data.pipeline=evl",), "cuda", ""),
        ((), "cuda", ""),
    ],
)
def test_the_choice_has_a_reason(pairs: tuple[str, ...], device: str, reason: str) -> None:
    why = why_not_on_device(load_config(None, [*SETTINGS, *pairs]), torch.device(device))
    assert why.startswith(reason) and bool(why) == bool(reason)


@pytest.mark.parametrize("room", [2, 1, 0])
def test_out_of_memory_no_video_is_lost(
    entries: list[Entry], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device with room for the frames of `room` videos at a time."""
    config = load_config(None, SETTINGS)
    loader = DeviceLoader(entries, config, device=CPU)
    read = BatchReader.read

    def tight(reader: BatchReader, requests: Sequence[Request]) -> list[Decoded | VideoError]:
        if len(requests) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(reader, requests)

    monkeypatch.setattr(BatchReader, "read", tight)
    there, here = list(loader), list(ScoringLoader(entries, config))
    assert len(there) == len(here)
    for a, b in zip(there, here, strict=True):
        if isinstance(a, BadVideo) or isinstance(b, BadVideo):
            assert a == b
        else:
            assert a.name == b.name and torch.equal(a.images, b.images)
            assert a.notes == (() if room else (NO_ROOM,))


def test_a_result_for_every_request(entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """One too few would give every later video the frames of its neighbour."""
    loader = DeviceLoader(entries, load_config(None, SETTINGS), device=CPU)
    read = BatchReader.read
    monkeypatch.setattr(BatchReader, "read", lambda self, requests: read(self, requests)[1:])
    with pytest.raises(AssertionError, match="a result for every request"):
        list(loader)
