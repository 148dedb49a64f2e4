"""Loaders over real H.264 clips: order, restarts, ranks, bad files, threads that end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from kineticlip.config import Config, load_config
from kineticlip.data import scoring_loader, training_loader
from kineticlip.data.ahead import run_ahead
from kineticlip.data.batch import BadVideo, Batch, VideoViews
from kineticlip.data.entries import Entry
from kineticlip.data.lists import read_list
from kineticlip.data.order import TrainingOrder, order_of
from kineticlip.data.sampling import text4vis_uniform_test
from kineticlip.data.statistics import CLIP_STATISTICS, PixelStatistics
from kineticlip.data.views import apply_pillow, text4vis_geometry
from kineticlip.runtime.errors import UserError
from kineticlip.video import open_video

GOLDEN = Path(__file__).parents[1] / "golden"
WIDTH, HEIGHT = 64, 48

views_of = partial(scoring_loader.views_of, statistics=CLIP_STATISTICS)
ScoringLoader = partial(scoring_loader.ScoringLoader, statistics=CLIP_STATISTICS)
TrainLoader = partial(training_loader.TrainLoader, statistics=CLIP_STATISTICS)


def make_clip(path: Path, count: int, seed: int) -> None:
    """`count` frames of a moving pattern as H.264 in MP4."""
    noise = np.random.default_rng(seed).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    pattern = noise.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(pattern, 3 * number, axis=1), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    """Seven videos of 5 to 17 frames, labels 0 to 2."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for number in range(7):
        make_clip(folder / f"v{number}.mp4", 5 + 2 * number, number)
        lines.append(f"v{number}.mp4 {number % 3}\n")
    (folder / "list.txt").write_text("".join(lines))
    return list(read_list(folder / "list.txt", folder).entries)


@pytest.fixture
def bad(tmp_path: Path) -> Entry:
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    return Entry("noise.mp4", str(tmp_path / "noise.mp4"), 1)


def settings(*pairs: str) -> Config:
    small = [
        "data.resolution=32",
        "data.num_frames=4",
        "train.micro_batch_size=2",
        "data.workers=2",
    ]
    return load_config(None, [*small, *pairs])


def same(left: Batch, right: Batch) -> bool:
    return (
        left.names == right.names
        and torch.equal(left.labels, right.labels)
        and torch.equal(left.pixels, right.pixels)
    )


def test_views_of_one_video_are_its_frames_and_crops(clips: list[Entry]) -> None:
    config = settings("test.clips=3", "test.crops=3")
    video = views_of(clips[2], config)
    source = open_video(clips[2].path)
    indices = text4vis_uniform_test(source.num_frames, 4, 3)
    shape = text4vis_geometry(WIDTH, HEIGHT, size=32, crops=3)
    expected = apply_pillow(source.read(indices.ravel().tolist()), shape, crops=shape.crops)
    expected = expected.unflatten(0, (3, 4)).permute(2, 0, 1, 3, 4, 5).flatten(0, 1)
    assert torch.equal(video.clips(), expected)  # [crops * K, T, 3, S, S], crop-major
    assert video.images.shape == (len(np.unique(indices)), 3, 3, 32, 32)
    assert (video.name, video.label, video.num_frames) == ("v2.mp4", 2, 9)
    assert video.decoder == source.decoder
    by_path = views_of(clips[2].path, config)
    assert torch.equal(by_path.images, video.images)
    assert by_path.label == -1


def test_reading_in_portions_changes_nothing(
    clips: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    for pipeline in ("text4vis", "evl"):
        config = settings("test.clips=4", "test.crops=3", f"data.pipeline={pipeline}")
        whole = views_of(clips[6], config)
        monkeypatch.setattr(scoring_loader, "READ_BYTES", 3 * 3 * WIDTH * HEIGHT)
        portions = views_of(clips[6], config)
        monkeypatch.undo()
        assert torch.equal(portions.clips(), whole.clips())


def test_the_test_loader_keeps_list_order_and_names_bad_files(
    clips: list[Entry], bad: Entry
) -> None:
    absent = Entry("absent.mp4", str(Path(bad.path).parent / "absent.mp4"), 0)
    entries = [clips[3], bad, *clips[:2], absent, clips[6]]
    config = settings("data.workers=3")
    items = list(ScoringLoader(entries, config))
    assert [item.name for item in items] == [entry.name for entry in entries]
    assert [item.label for item in items] == [entry.label for entry in entries]
    broken = [item for item in items if isinstance(item, BadVideo)]
    assert [item.name for item in broken] == ["noise.mp4", "absent.mp4"]
    assert all(item.reason and "\n" not in item.reason for item in broken)
    single = list(ScoringLoader(entries, settings("data.workers=1")))
    for one, other in zip(items, single, strict=True):
        if isinstance(one, VideoViews):
            assert isinstance(other, VideoViews)
            assert torch.equal(one.clips(), other.clips())


def test_ranks_share_the_test_list_without_padding(clips: list[Entry]) -> None:
    parts = [ScoringLoader(clips, settings(), rank=rank, world=3) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    names = [[item.name for item in part] for part in parts]
    assert sorted(name for part in names for name in part) == [entry.name for entry in clips]
    assert names[1] == ["v1.mp4", "v4.mp4"]


def test_settings_that_no_video_can_meet_fail_before_the_first_video(clips: list[Entry]) -> None:
    with pytest.raises(UserError, match="1 or 3 crops, got 5"):
        ScoringLoader(clips, settings("test.crops=5"), pipeline="evl")
    with pytest.raises(UserError, match="at most 128 frames"):
        TrainLoader(clips, settings("data.num_frames=200", "data.sampling=dense"))
    with pytest.raises(UserError, match="no video to train on"):
        TrainLoader([], settings())
    with pytest.raises(UserError, match="one label a video"):
        TrainLoader([Entry("a", "a", -1, labels=(1, 2))], settings())


def test_training_batches_depend_on_the_seed_alone(clips: list[Entry]) -> None:
    first = list(TrainLoader(clips, settings()).epoch(0))
    again = list(TrainLoader(clips, settings("data.workers=4")).epoch(0))
    other = list(TrainLoader(clips, settings("seed=7")).epoch(0))
    assert len(first) == len(TrainLoader(clips, settings())) == 4
    assert all(map(same, first, again))
    assert not all(map(same, first, other))
    pixels = first[0].pixels
    assert (pixels.shape, pixels.dtype) == ((2, 4, 3, 32, 32), torch.uint8)
    labels = {entry.name: entry.label for entry in clips}
    for batch in first:
        assert batch.labels.tolist() == [labels[name] for name in batch.names]
        assert batch.labels.dtype == torch.int64


def test_a_restart_goes_on_with_the_same_batches(clips: list[Entry]) -> None:
    whole = list(TrainLoader(clips, settings()).epoch(2))
    rest = list(TrainLoader(clips, settings()).epoch(2, start=1))
    assert len(rest) == len(whole) - 1
    assert all(map(same, whole[1:], rest))
    assert not same(whole[0], whole[1])


def test_an_entry_looks_different_in_every_pass(clips: list[Entry]) -> None:
    train = TrainLoader(clips[:1], settings("train.micro_batch_size=1"))
    seen = [next(iter(train.epoch(epoch))) for epoch in range(3)]
    assert {batch.names for batch in seen} == {("v0.mp4",)}
    assert not torch.equal(seen[0].pixels, seen[1].pixels)
    assert not torch.equal(seen[1].pixels, seen[2].pixels)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_pass_holds_every_entry_once_over_all_ranks(world: int) -> None:
    entries = [Entry(f"e{i}", f"e{i}", 0) for i in range(7)]
    ranks = [order_of(entries, settings(), rank=rank, world=world) for rank in range(world)]
    assert len({rank.batches for rank in ranks}) == 1
    places = [rank.locate(p) for number in range(30) for rank in ranks for p in rank.places(number)]
    for turn in range(8):
        indices = [index for other, index in places if other == turn]
        assert sorted(indices) == list(range(7))
    assert len({tuple(i for t, i in places if t == turn) for turn in range(8)}) > 6


def test_the_order_is_evls() -> None:
    """create_train_loader of the official code; its batch is one micro-batch of every rank."""
    for case in json.loads((GOLDEN / "evl" / "train_loader_order.json").read_text()):
        order = TrainingOrder(
            length=case["dataset_len"],
            seed=0,
            size=case["batch_size"] // case["world_size"],
            rank=case["rank"],
            world=case["world_size"],
        )
        numbers = range(case["resume_step"], case["num_steps"])
        got = [order.locate(place)[1] for number in numbers for place in order.places(number)]
        assert got == case["indices"]


def test_bad_files_are_named_and_their_places_refilled_without_a_shift(
    clips: list[Entry], bad: Entry
) -> None:
    entries = [*clips[:3], bad, *clips[3:]]
    clean = TrainLoader([*clips[:3], clips[0], *clips[3:]], settings())
    train = TrainLoader(entries, settings())
    expected, batches = list(clean.epoch(0)), list(train.epoch(0))
    assert [len(batch.names) for batch in batches] == [2] * len(train)
    assert {name for batch in batches for name in batch.names} == {e.name for e in clips}
    assert list(train.bad) == ["noise.mp4"]
    assert train.bad["noise.mp4"].label == 1
    assert train.bad["noise.mp4"].reason
    assert train.refilled == 1
    changed = 0
    for number, (one, other) in enumerate(zip(expected, batches, strict=True)):
        for slot, place in enumerate(train.order.places(number)):
            if train.order.locate(place)[1] == 3:
                next_place = train.order.places(number + 1)[slot]
                assert other.names[slot] == entries[train.order.locate(next_place)[1]].name
                changed += 1
            else:
                assert other.names[slot] == one.names[slot]
                assert torch.equal(other.pixels[slot], one.pixels[slot])
    assert changed == 1
    rest = list(TrainLoader(entries, settings()).epoch(0, start=2))
    assert all(map(same, batches[2:], rest))


def test_nothing_readable_stops_training_with_one_line(tmp_path: Path) -> None:
    entries = [Entry(f"e{i}.mp4", str(tmp_path / f"e{i}.mp4"), 0) for i in range(3)]
    with pytest.raises(UserError, match=r"32 videos in a row cannot be read; the first: e\d.mp4: "):
        next(TrainLoader(entries, settings()).epoch(0))
    assert not loader_threads()


def test_evl_batches_are_normalised_floats(clips: list[Entry]) -> None:
    config = settings("data.sampling=dense", "data.sampling_rate=2")
    batch = next(TrainLoader(clips, config, pipeline="evl").epoch(0))
    assert (batch.pixels.shape, batch.pixels.dtype) == ((2, 4, 3, 32, 32), torch.float32)
    assert batch.pixels.min() < 0 < batch.pixels.max() < 3
    forced = next(TrainLoader(clips, settings("data.pipeline=bike"), pipeline="evl").epoch(0))
    assert forced.pixels.dtype == torch.uint8


@pytest.mark.parametrize("augmentation", ["none", "released"])
def test_float_pixels_are_normalised_with_the_statistics_given(
    clips: list[Entry], augmentation: str
) -> None:
    config = settings("data.pipeline=evl", f"data.augmentation={augmentation}")
    other = PixelStatistics(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.125))

    def bytes_of(pixels: torch.Tensor, statistics: PixelStatistics) -> torch.Tensor:
        shape = (3, 1, 1)
        scale, shift = torch.tensor(statistics.std), torch.tensor(statistics.mean)
        return 255 * (pixels * scale.view(shape) + shift.view(shape))

    ours = next(training_loader.TrainLoader(clips, config, statistics=other).epoch(0)).pixels
    clip = next(TrainLoader(clips, config).epoch(0)).pixels
    assert not torch.allclose(ours, clip)
    torch.testing.assert_close(
        bytes_of(ours, other), bytes_of(clip, CLIP_STATISTICS), atol=1e-3, rtol=0
    )
    views = scoring_loader.views_of(clips[0], config, statistics=other)
    assert views.statistics == other
    torch.testing.assert_close(
        bytes_of(views.images, other),
        bytes_of(views_of(clips[0], config).images, CLIP_STATISTICS),
        atol=1e-3,
        rtol=0,
    )


@pytest.fixture
def stretches(tmp_path: Path) -> list[Entry]:
    """A Charades-like folder of 48 frames whose gray level is the frame number, cut in three."""
    folder = tmp_path / "AB1CD"
    folder.mkdir()
    for number in range(48):
        picture = np.full((40, 40, 3), 5 * number, dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"AB1CD-{number + 1:06d}.png")
    rows = "video_id,label,start_time,end_time,total_time\nAB1CD,c001,0.50,1.50,2.00\n"
    (tmp_path / "rows.csv").write_text(
        rows + "AB1CD,c002,1.00,9.00,2.00\nAB1CD,c003,3.00,4.00,9.00\n"
    )
    return list(read_list(tmp_path / "rows.csv", tmp_path).entries)


def test_stretches_show_only_their_own_frames(stretches: list[Entry]) -> None:
    config = settings("data.frame_template={id}-{:06d}.png", "data.augmentation=none")
    for pipeline in ("text4vis", "bike"):
        train = TrainLoader(stretches[:2], config, pipeline=pipeline)
        for epoch in range(4):
            for batch in train.epoch(epoch):
                shown = (batch.pixels.float().mean((2, 3, 4)) / 5).round()  # [B, T]
                for name, numbers in zip(batch.names, shown.int().tolist(), strict=True):
                    low, high = (12, 36) if name.endswith("1.50") else (24, 48)
                    assert low <= min(numbers) <= max(numbers) < high
                    assert numbers == sorted(numbers)
    view = views_of(stretches[0], config)
    assert view.num_frames == 24
    assert (view.images.float().mean((1, 2, 3, 4)) / 5).round().tolist() == [12, 18, 24, 30]
    (beyond,) = ScoringLoader(stretches[2:], config)
    assert isinstance(beyond, BadVideo)
    assert "has 48 frames; the stretch begins at 72" in beyond.reason


def test_a_strip_of_pixels_is_a_bad_video(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 10)).save(tmp_path / "img_00001.png")
    config = settings("data.frame_template=img_{:05d}.png")
    (item,) = ScoringLoader([Entry("strip", str(tmp_path), 0)], config)
    assert item == BadVideo("strip", 0, "is 2000 x 10, too narrow to be resized")


def loader_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("kineticlip-loader")]


def test_leaving_a_loop_early_ends_its_threads(clips: list[Entry]) -> None:
    for item in ScoringLoader(clips, settings()):
        assert isinstance(item, VideoViews)
        break
    assert not loader_threads()
    batches = TrainLoader(clips, settings()).epoch(0)
    assert isinstance(batches, Generator)
    next(batches)
    batches.close()
    assert not loader_threads()


def test_only_so_many_results_wait() -> None:
    """Tasks are drawn when their results may wait; every third ends after the one behind it."""
    done = [threading.Event() for _ in range(50)]
    drawn = []

    def task(number: int) -> int:
        if number % 3 == 0 and number + 1 < len(done):
            assert done[number + 1].wait(timeout=60)
        done[number].set()
        return number

    def tasks() -> Iterator[Callable[[], int]]:
        for number in range(len(done)):
            drawn.append(number)
            yield partial(task, number)

    got = []
    for result in run_ahead(tasks(), workers=4, ahead=6):
        got.append(result)
        assert len(drawn) == min(len(got) + 6, len(done))
    assert got == list(range(len(done))) == drawn
    assert not loader_threads()


def test_an_exception_comes_out_in_its_place_and_ends_the_threads() -> None:
    def fail() -> int:
        raise ZeroDivisionError("a bug, not a bad file")

    tasks: list[Callable[[], int]] = [lambda: 1, fail, lambda: 3]
    results = run_ahead(tasks, workers=2, ahead=3)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not loader_threads()


def test_a_configured_probe_cache_is_used(tmp_path: Path, clips: list[Entry]) -> None:
    assert settings().data.probe_cache == "auto"
    config = settings(f"data.val_root={tmp_path}")
    first = list(ScoringLoader(clips, config))
    kept = (tmp_path / ".kineticlip-probes.jsonl").read_text()
    assert len(kept.splitlines()) == len(clips)
    again = list(ScoringLoader(clips, config))
    for one, two in zip(first, again, strict=True):
        assert isinstance(one, VideoViews) and isinstance(two, VideoViews)
        assert torch.equal(one.images, two.images)
