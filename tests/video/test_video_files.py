"""Files on disk: bad ones, folders of images, the probe cache, the command."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_clips import number_of, picture, read_plainly

from kineticlip.__main__ import main
from kineticlip.data import prepare
from kineticlip.data.entries import Entry
from kineticlip.runtime.errors import UserError
from kineticlip.video import ProbeCache, VideoError, open_video, plan_frames
from kineticlip.video.cache import NAME, cache_path
from kineticlip.video.container import MAX_PIXELS
from kineticlip.video.probe import TURNS, Scan, scan

Clip = Callable[[str], Path]


# --- files that are no videos ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><title>404</title>", "web page"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not followed"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:10\nfile:///etc/passwd\n", "not followed"),
        (b"hello\n" * 300, "not a video that FFmpeg can open"),
    ],
)
def test_files_that_are_no_videos(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=reason) as caught:
        open_video(path)
    copy = pickle.loads(pickle.dumps(caught.value))  # it comes out of worker processes
    assert (copy.path, copy.reason) == (str(path), caught.value.reason)


@pytest.mark.parametrize("name", ["h264", "vp9", "mpeg4_bframes"])
@pytest.mark.parametrize("keep", [0.02, 0.5])
def test_files_cut_off(clip: Clip, tmp_path: Path, name: str, keep: float) -> None:
    """A reason, or the frames that a plain read still finds."""
    content = clip(name).read_bytes()
    path = tmp_path / clip(name).name
    path.write_bytes(content[: int(len(content) * keep)])
    try:
        video = open_video(path)
    except VideoError as error:
        assert error.reason
        return
    frames = video.read([0, video.num_frames - 1])
    _, plain = read_plainly(path)
    np.testing.assert_array_equal(frames, [plain[0], plain[max(plain)]])


def test_only_local_files_are_opened(tmp_path: Path) -> None:
    for path in ("http://localhost/clip.mp4", "concat:a.mp4|b.mp4", "file:/etc/passwd"):
        with pytest.raises(VideoError, match="no such file"):
            open_video(path)
    with pytest.raises(VideoError, match="not a regular file"):
        open_video(os.devnull)


def test_names_that_look_like_protocols_are_plain_names(clip: Clip, tmp_path: Path) -> None:
    path = tmp_path / "concat:100%d.mp4"
    path.write_bytes(clip("h264").read_bytes())
    assert number_of(open_video(path).read([9])[0]) == 9


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_of_images_is_a_video(tmp_path: Path) -> None:
    for number in range(3, 9):  # the first one need not be 0 or 1
        Image.fromarray(picture(number)).save(tmp_path / f"img_{number:05d}.png")
    for other in ("img_00002.jpg", "img_9.png", "flow_00010.png", "notes.txt"):
        (tmp_path / other).write_bytes(b"")
    video = open_video(tmp_path, frame_template="img_{:05d}.png")
    assert (video.num_frames, video.width, video.height) == (6, 144, 96)
    assert (video.decoder, video.notes) == ("folder", [])
    np.testing.assert_array_equal(video.read([5, 0, 5]), [picture(8), picture(3), picture(8)])
    with pytest.raises(VideoError, match="no frame 6; it has 6"):
        video.read([6])


def test_folders_that_are_no_videos(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"named like 'img_00001\.jpg'"):
        open_video(tmp_path)
    for number in (1, 2, 4):
        Image.fromarray(picture(number)).save(tmp_path / f"img_{number:05d}.jpg")
    with pytest.raises(VideoError, match=r"'img_00003\.jpg' is missing"):
        open_video(tmp_path)
    (tmp_path / "img_00003.jpg").write_bytes(b"no image")
    with pytest.raises(VideoError, match="not a readable image"):
        open_video(tmp_path).read([0, 2])
    Image.fromarray(picture(3, 160, 96)).save(tmp_path / "img_00003.jpg")
    with pytest.raises(VideoError, match="160 x 96, the first image 144 x 96"):
        open_video(tmp_path).read([0, 2])
    content = (tmp_path / "img_00004.jpg").read_bytes()
    (tmp_path / "img_00004.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError, match="damaged image"):
        open_video(tmp_path).read([3])
    for template in ("img.jpg", "{:05d}_{:02d}.jpg", "{name}.jpg"):
        with pytest.raises(UserError, match="expected one number"):
            open_video(tmp_path, frame_template=template)


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything; nobody may not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)


def test_what_may_not_be_read_is_named(clip: Clip) -> None:
    names = ("clip.mp4", "frames", "inner/clip.mp4")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        paths = [Path(folder, name) for name in names]
        for place in (paths[1], paths[2].parent):
            place.mkdir()
        for place in (paths[0], paths[2]):
            place.write_bytes(clip("h264").read_bytes())
        for place in (paths[0], paths[1], paths[2].parent):
            place.chmod(0)
        with without_privileges():
            for path in paths:
                with pytest.raises(VideoError, match="Permission denied"):
                    open_video(path)
            entries = [Entry(path.name, str(path), 0) for path in paths]
            reasons = [item.reason for item in prepare.check(entries, workers=1)]
    assert ["Permission denied" in reason for reason in reasons] == [True] * 3


# --- the cache ----------------------------------------------------------------------------------


def test_the_cache_remembers_unchanged_files(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kineticlip.video.cache as module

    scanned: list[str | Path] = []

    def noted(path: str | Path) -> Scan:
        scanned.append(path)
        return scan(path)

    monkeypatch.setattr(module, "scan", noted)
    video = tmp_path / "clip.mp4"
    video.write_bytes(clip("h264").read_bytes())
    for _ in range(2):
        with ProbeCache(tmp_path / "probes.jsonl") as cache:
            first, again = (open_video(video, cache=cache) for _ in range(2))
            assert first.probe == again.probe == scan(video).probe
            assert [number_of(frame) for frame in again.read([33, 2])] == [33, 2]
            with pytest.raises(VideoError):
                cache.scan(tmp_path / "probes.jsonl")  # bad files are not remembered
    assert scanned.count(video) == 1
    video.write_bytes(clip("hevc").read_bytes())
    with ProbeCache(tmp_path / "probes.jsonl") as cache:
        assert open_video(video, cache=cache).probe.codec == "hevc"
    assert scanned.count(video) == 2


def test_the_cache_moves_with_its_data_set_and_survives_torn_lines(
    clip: Clip, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "clip.mp4").write_bytes(clip("vp9").read_bytes())
    with ProbeCache(data / "probes.jsonl") as cache:
        cache.scan(data / "clip.mp4")
    with (data / "probes.jsonl").open("a") as file:
        file.write('["torn", "clip')
    data = data.rename(tmp_path / "moved")
    with ProbeCache(data / "probes.jsonl") as cache:
        assert len(cache) == 1
        found = cache.scan(data / "clip.mp4")
    assert found.table is None and found.probe.path == str(data / "clip.mp4")


def _fill(arguments: tuple[Path, list[Path]]) -> None:
    path, videos = arguments
    with ProbeCache(path) as cache:
        for video in videos:
            cache.scan(video)


def test_processes_share_one_cache(clip: Clip, tmp_path: Path) -> None:
    videos = [clip(name) for name in ("h264", "hevc", "vp9", "vp8", "mjpeg", "mpeg4_bframes")]
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.map(
            _fill,
            [(tmp_path / "probes.jsonl", videos[:4]), (tmp_path / "probes.jsonl", videos[2:])],
        )
    with ProbeCache(tmp_path / "probes.jsonl") as cache:
        assert len(cache) == len(videos)


def test_a_cache_that_cannot_be_one_is_an_error(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "missing" / "probes.jsonl", "folder"), (tmp_path, "regular")):
        with pytest.raises(UserError, match=f"cannot be used as probe cache: .*{reason}"):
            ProbeCache(path)


def test_a_cache_that_cannot_be_written_is_said_once_and_does_without(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, line: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with ProbeCache(tmp_path / "probes.jsonl") as cache:
        for name in ("h264", "vp9", "hevc"):
            assert cache.scan(clip(name)).probe.num_frames == 40
        assert len(cache) == 3
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'probes.jsonl'}: probes are not kept: No space left on device"
    ]


def test_a_cache_full_of_lies_is_passed_over(clip: Clip, tmp_path: Path) -> None:
    with ProbeCache(tmp_path / "probes.jsonl") as cache:
        truth = cache.scan(clip("h264")).probe
    row = json.loads((tmp_path / "probes.jsonl").read_text())
    values: list[Any] = [None, [], {}, "7.5", -1, 1 << 70]
    wrong = [
        [*row[:place], value, *row[place + 1 :]] for place in range(1, len(row)) for value in values
    ]
    # what is still believed has another name, size or time, or a number that may be any
    for line in wrong:
        (tmp_path / "probes.jsonl").write_text(f"{json.dumps(line)}\n")
        with ProbeCache(tmp_path / "probes.jsonl") as cache:
            probe = cache.scan(clip("h264")).probe
        assert probe.num_frames > 0 and 0 < probe.width * probe.height <= MAX_PIXELS
        assert (probe.rotation, probe.mirrored) in TURNS
        assert isinstance(probe.codec, str) and isinstance(probe.in_time_order, bool)
        assert "None" not in repr(probe)
    (tmp_path / "probes.jsonl").write_text("[" * 100_000 + "\n7\n{}\n" + json.dumps(row) + "\n")
    with ProbeCache(tmp_path / "probes.jsonl") as cache:
        assert len(cache) == 1 and cache.scan(clip("h264")).probe == truth


def test_where_the_cache_lies(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    listed, root = str(tmp_path / "val.txt"), str(tmp_path / "videos")
    assert cache_path("auto", root=root, listed=listed) == tmp_path / "videos" / NAME
    assert cache_path("auto", root="", listed=listed) == tmp_path / NAME
    assert cache_path("auto", root=f"{root}/none", listed=listed) is None
    assert cache_path("auto", root="", listed="") is None
    assert cache_path("off", root=root, listed=listed) is None
    assert cache_path("here.jsonl", root=root, listed=listed) == Path("here.jsonl")


# --- plans and the command ----------------------------------------------------------------------


def test_a_plan_decodes_each_frame_once() -> None:
    indices = np.array([[0, 4, 8], [4, 8, 2]])
    plan = plan_frames(indices)
    assert plan.frames == (0, 2, 4, 8)
    assert plan.index.dtype == np.int64
    np.testing.assert_array_equal(np.array(plan.frames)[plan.index], indices)


def test_frames_writes_an_archive(
    clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "frames.npz"
    arguments = ["frames", str(clip("h264_turned")), "--at", "30,2,5-7,2", "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_frames"], facts["decoder"], facts["notes"]) == (40, "pyav", [])
    assert (facts["width"], facts["height"], facts["rotation"]) == (96, 144, 90)
    _, plain = read_plainly(clip("h264_turned"))
    with np.load(out) as archive:
        numbers = archive["numbers"]
        assert numbers.tolist() == [30, 2, 5, 6, 7, 2] == facts["at"]
        np.testing.assert_array_equal(archive["frames"], [plain[number] for number in numbers])
    assert list(tmp_path.iterdir()) == [out]  # nothing left beside it


def test_frames_writes_images(
    clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "some" / ""
    arguments = ["frames", str(clip("h264")), "--at", "12,39", "--out", f"{out}/"]
    assert main(arguments) == 0
    assert "40 frames of 144 x 96" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "some").iterdir())
    assert names == ["frame_000012.png", "frame_000039.png"]
    assert number_of(np.asarray(Image.open(tmp_path / "some" / names[1]))) == 39
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at", "3,40", "--out", "x.npz"], "has no frame 40; it has 40, numbered 0 to 39"),
        (["--at", "3,-1", "--out", "x.npz"], "expected frame numbers like 0,10,20-29, got '-1'"),
        (["--at", "9-3", "--out", "x.npz"], "got '9-3'"),
        (["--at", "3"], "--at and --out go together"),
        (["--at", "3", "--out", "missing/x.npz"], "cannot be written"),
        (["--at", "3", "--out", "frame.png"], "frame.png would be a folder; name one, or FILE.npz"),
    ],
)
def test_frames_says_what_is_wrong(
    clip: Clip,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["frames", str(clip("h264")), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
