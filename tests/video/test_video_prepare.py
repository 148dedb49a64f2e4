"""`kineticlip prepare`: lists without unreadable videos, and copies with the same frames."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from PIL import Image
from video_clips import number_of, picture

from kineticlip.__main__ import main
from kineticlip.data.lists import read_list
from kineticlip.video import open_video
from kineticlip.video.copies import shrunk
from kineticlip.video.probe import probe

Clip = Callable[[str], Path]


@pytest.fixture
def videos(clip: Clip, tmp_path: Path) -> Path:
    """A folder with three videos, a web page and a damaged one in two class folders."""
    root = tmp_path / "videos"
    for folder, name in (
        ("run", "h264"),
        ("run", "mpeg4_bframes"),
        ("jump high", "h264_turned"),
        ("jump high", "hevc"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        source = clip(name)
        content = bytearray(source.read_bytes())
        if name == "hevc":  # wreck the middle of the picture data
            for offset in range(len(content) // 3, len(content) // 3 + 300):
                content[offset] = offset % 251
        (root / folder / f"{name}{source.suffix}").write_bytes(content)
    (root / "run" / "page.mp4").write_text("<!DOCTYPE html>")
    (root / "run" / "notes.txt").write_text("no video")
    return root


def run(*arguments: object) -> int:
    return main(["prepare", *map(str, arguments), "--workers", "2"])


def test_a_folder_becomes_a_list(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, classes = (tmp_path / name for name in ("good.txt", "bad.tsv", "classes.txt"))
    lists = ("--good", good, "--bad", bad, "--classes", classes)
    assert run(videos, *lists, "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert classes.read_text() == "jump high\nrun\n"
    entries = read_list(good, videos).entries
    assert {(Path(entry.path).name, entry.label) for entry in entries} >= {
        ("h264_turned.mp4", 0),
        ("h264.mp4", 1),
        ("mpeg4_bframes.avi", 1),
    }
    assert all(Path(entry.path).is_file() for entry in entries)
    assert (
        bad.read_text().startswith("run/page.mp4\tis a web page") or "page.mp4" in bad.read_text()
    )
    wrecked = next(item for item in facts["items"] if "hevc" in item["name"])
    assert wrecked["reason"] or wrecked["damaged"] > 0
    assert facts["videos"] == 5 and facts["turned"] == 1 and facts["read_in_sequence"] == 1
    assert facts["readable"] + facts["unreadable"] == 5
    assert facts["frames"] == [40, 40, 40]


def test_a_list_keeps_its_other_lines_to_the_letter(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, good, bad = (tmp_path / name for name in ("list.txt", "good.txt", "bad.tsv"))
    lines = [
        "run/h264.mp4   3",
        "run/page.mp4 3",
        '"jump high/h264_turned.mp4" 1',
        "run/gone.mp4 3",
        "",
        "run/h264.mp4 2",
    ]
    source.write_text("\n".join(lines))
    cache = tmp_path / "probes.jsonl"
    for _ in range(2):  # the second time from the cache
        assert run(source, "--root", videos, "--good", good, "--bad", bad, "--cache", cache) == 1
        assert good.read_text() == "\n".join([lines[0], lines[2], *lines[4:]])
        names = [line.split("\t") for line in bad.read_text().splitlines()]
        assert [name for name, _ in names] == ["run/page.mp4", "run/gone.mp4"]
        assert names[1][1] == "no such file"
        table = capsys.readouterr().out
        assert "5 videos, 2 unreadable" in table and "h264 yuv420p in mov" in table
    assert len(cache.read_text().splitlines()) == 2


def test_only_a_full_decode_finds_damaged_pictures(
    clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clip.mp4"
    content = bytearray(clip("h264").read_bytes())
    with av.open(str(clip("h264"))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][24]
        # The third group's first picture: its slice data, not its header.
        content[packet.pos + 40 : packet.pos + packet.size] = b"\xaa" * (packet.size - 40)
    path.write_bytes(content)
    damaged = {}
    for options in ((), ("--quick",)):
        run(tmp_path, *options, "--json")
        facts = json.loads(capsys.readouterr().out)
        assert (facts["videos"], facts["readable"]) == (1, 1)
        damaged[options] = facts["items"][0]["damaged"]
    assert damaged[()] > 0 and damaged["--quick",] == -1


def test_copies_have_the_same_frames_in_short_groups(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, good = tmp_path / "copies", tmp_path / "good.txt"
    (videos / "jump high" / "hevc.mp4").unlink()
    arguments = (videos, "--reencode", out, "--side", "96", "--good", good)
    assert run(*arguments) == 1
    entries = read_list(good, out).entries
    assert {Path(entry.path).name for entry in entries} == {
        "h264.mp4",
        "h264_turned.mp4",
        "mpeg4_bframes.mp4",
    }
    written = {}
    for entry in entries:
        video = open_video(entry.path)
        written[entry.path] = Path(entry.path).stat().st_mtime_ns
        assert (video.num_frames, video.notes, video.probe.color_matrix) == (40, [], "bt601")
        assert video.probe.keyframes >= 4 and not video.probe.rotation
        if "turned" in entry.path:
            assert (video.width, video.height) == (96, 144)
        else:
            assert [number_of(frame) for frame in video.read([39, 0, 17])] == [39, 0, 17]
    assert run(*arguments) == 1  # what is there already stays
    assert {path: Path(path).stat().st_mtime_ns for path in written} == written
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("way", ["--reencode", "--frames"])
def test_copies_follow_their_source_and_the_settings(
    clip: Clip, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    video = source / "clip.mp4"
    copy = out / ("clip.mp4" if way == "--reencode" else "clip")

    def made(side: int) -> tuple[int, bool]:
        assert run(source, way, out, "--side", side) == 0, capsys.readouterr()
        found = open_video(copy)
        brightness = found.read([0, 39]).mean(axis=(1, 2, 3))
        return found.height, bool(brightness[0] < brightness[1])

    video.write_bytes(clip("h264").read_bytes())
    assert made(96) == (96, True)
    first = copy.stat().st_mtime_ns
    assert made(96)[0] == 96 and copy.stat().st_mtime_ns == first
    with av.open(str(video), "w") as output:  # as many frames, the other way round
        stream = output.add_stream("libx264", rate=30, options={"crf": "30"})
        stream.width, stream.height, stream.pix_fmt = 144, 96, "yuv420p"
        for number in range(39, -1, -1):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert made(96) == (96, False)
    assert made(64)[0] == 64
    assert [path.name for path in out.iterdir()] == [copy.name]


def test_copies_replace_nothing_but_copies(
    clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "clip.mp4"
    video.write_bytes(clip("h264").read_bytes())
    (tmp_path / "list.txt").write_text("clip.mp4 0\n")
    listed = (tmp_path / "list.txt", "--root", tmp_path)
    assert run(*listed, "--reencode", tmp_path, "--side", 64) == 1
    assert "exists and is no copy made here" in capsys.readouterr().out
    assert video.read_bytes() == clip("h264").read_bytes()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "mine.txt").write_text("mine")
    assert run(*listed, "--frames", tmp_path) == 1
    assert (tmp_path / "clip" / "mine.txt").exists()


def test_folders_of_frames_become_videos_and_smaller_folders(
    clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames, good = tmp_path / "frames", tmp_path / "good.txt"
    listed = tmp_path / "list.txt"
    for name in ("a", "b"):
        (frames / name).mkdir(parents=True)
        for number in range(20):
            image = Image.fromarray(picture(number + 1))
            image.save(frames / name / f"{number + 1:03d}.png")
    Image.fromarray(picture(3, 64, 64)).save(frames / "b" / "007.png")
    listed.write_text("a 20 1\nb 20 0\n")
    for way, copy in (("--reencode", "a.mp4"), ("--frames", "a")):
        out = tmp_path / "out" / way
        arguments = (listed, "--root", frames, "--frame-template", "{:03d}.png", "--good", good)
        assert run(*arguments, way, out) == 1
        assert "64 x 64, the first image 144 x 96" in capsys.readouterr().out
        assert good.read_text() == f"{copy} 20 1\n"
        video = open_video(out / copy)
        assert [number_of(frame) for frame in video.read([0, 19])] == [1, 20]


def test_a_folder_without_classes_becomes_a_list_without_labels(clip: Clip, tmp_path: Path) -> None:
    source, good = tmp_path / "in", tmp_path / "good.txt"
    source.mkdir()
    (source / "a clip.mp4").write_bytes(clip("h264").read_bytes())
    (source / "b.mp4").write_bytes(clip("vp9").read_bytes())
    for more, names in (
        ([], ["a clip.mp4", "b.mp4"]),
        (["--frames", tmp_path / "jpg"], ["a clip", "b"]),
    ):
        assert run(source, "--good", good, *more) == 0
        entries = read_list(good).entries
        assert [(entry.name, entry.label, entry.labels) for entry in entries] == [
            (name, -1, ()) for name in names
        ]
    assert run(good, "--root", tmp_path / "jpg") == 0
    assert run(good, "--root", tmp_path / "jpg", "--reencode", tmp_path / "mp4") == 0


def test_names_that_no_list_can_hold_are_said(
    clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, good, bad = tmp_path / "in", tmp_path / "good.txt", tmp_path / "bad.tsv"
    source.mkdir()
    for name in (b"caf\xe9.mp4", b"two\nlines.mp4", b'the "best".mp4', b"plain.mp4"):
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(clip("vp9").read_bytes())
    assert run(source, "--good", good, "--bad", bad) == 1
    assert good.read_text() == "plain.mp4\n"
    rows = [line.split("\t") for line in bad.read_text().splitlines()]
    assert sorted(name for name, _ in rows) == [
        "caf\\udce9.mp4",
        'the "best".mp4',
        "two\\nlines.mp4",
    ]
    assert all("no list can name it" in reason for _, reason in rows)
    assert "4 videos, 3 unreadable" in capsys.readouterr().out


def test_copies_keep_a_variable_rate_and_mend_lying_times(clip: Clip, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("h264_vfr", "mpeg4_bframes"):
        (source / clip(name).name).write_bytes(clip(name).read_bytes())
    assert run(source, "--reencode", tmp_path / "out", "--side", 0) == 0
    before, after = probe(clip("h264_vfr")), probe(tmp_path / "out" / "h264_vfr.mp4")
    assert after.variable_rate
    assert after.duration == pytest.approx(before.duration, rel=0.02)
    assert probe(tmp_path / "out" / "mpeg4_bframes.mp4").in_time_order


def test_frames_become_folders(videos: Path, tmp_path: Path) -> None:
    source, good = tmp_path / "list.txt", tmp_path / "good.txt"
    source.write_text("run/mpeg4_bframes.avi 4\nrun/h264.mp4 2\nrun/h264.mp4 3\n")
    assert run(source, "--root", videos, "--frames", tmp_path / "jpg", "--good", good) == 0
    assert good.read_text() == "run/mpeg4_bframes 40 4\nrun/h264 40 2\nrun/h264 40 3\n"
    video = open_video(tmp_path / "jpg" / "run" / "mpeg4_bframes")
    assert (video.num_frames, video.decoder) == (40, "folder")
    assert [number_of(frame) for frame in video.read([31, 2])] == [31, 2]
    assert run(tmp_path / "good.txt", "--root", tmp_path / "jpg") == 0  # a list of folders


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reencode", "a", "--frames", "b"], "choose one"),
        (["--side", "333"], "--side: expected an even number"),
        (["--classes", "c"], "not every video"),
        (["--reencode", "a"], "would both become"),
        (["--reencode", "in"], "copies go to another place"),
        (["--frames", "in/frames"], "copies go to another place"),
    ],
)
def test_prepare_says_what_is_wrong(
    clip: Clip,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip.mp4", "clip.mkv"):
        Path("in").mkdir(exist_ok=True)
        Path("in", name).write_bytes(clip("h264").read_bytes())
    assert run("in", *arguments) == 2
    assert message in capsys.readouterr().err


def test_names_that_leave_the_folder_are_refused(
    clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "clip.mp4").write_bytes(clip("h264").read_bytes())
    (tmp_path / "list.txt").write_text("../clip.mp4 0\n")
    assert run(tmp_path / "list.txt", "--root", tmp_path / "in", "--frames", tmp_path / "out") == 2
    assert "with '..' cannot be written" in capsys.readouterr().err


def test_sizes_shrink_and_stay_even() -> None:
    assert shrunk(1920, 1080, 336) == (598, 336)
    assert shrunk(340, 256, 336) == (340, 256)
    assert shrunk(333, 271, 0) == (332, 272)
    assert shrunk(1, 1, 336) == (2, 2)
