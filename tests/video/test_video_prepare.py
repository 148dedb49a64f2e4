"""`kineticlip prepare`: lists without unreadable videos, and copies with the same frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from video_clips import number_of

from kineticlip.cli import main
from kineticlip.dataset import read_list
from kineticlip.video import open_video, probe
from kineticlip.video.convert import shrunk

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
