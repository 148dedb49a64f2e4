"""One evaluation by several processes ends with the bytes of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kineticlip.__main__ import main
from kineticlip.commands.demo.clips import render_clip, write_clip
from kineticlip.evaluation.parts import check_same_run, finished_videos, merge_parts
from kineticlip.evaluation.processes import Order, _failures
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.journal import Journal, read_journal

HEADER = {"format": 1, "protocol": {"frames": 4}}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips under 24 names and a file that is no video, with their list and labels."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(2):
        clip = render_clip(number, number, np.random.default_rng(number))
        write_clip(root / f"clip{number}.mp4", clip)
    lines = []
    for number in range(24):
        (root / f"copy{number}.mp4").symlink_to(root / f"clip{number % 2}.mp4")
        lines.append(f"copy{number}.mp4 {number % 2}\n")
    (root / "broken.mp4").write_text("not a video")
    (root / "list.txt").write_text("".join([*lines[:9], "broken.mp4 1\n", *lines[9:]]))
    (root / "labels.txt").write_text("moving left\nmoving right\n")
    return root


def words(videos: Path, out: Path, *more: str) -> list[str]:
    return [
        "eval", "--weights", "random", "--set", "model.arch=ViT-tiny-16",
        "--set", "data.resolution=64", "--set", "data.num_frames=2", "--set", "test.clips=2",
        "--list", str(videos / "list.txt"), "--root", str(videos),
        "--labels", str(videos / "labels.txt"), "--out", str(out),
        "--deterministic", "--scores", "--json", *more,
    ]  # fmt: skip


def test_two_processes_one_of_them_killed_end_with_the_bytes_of_one(
    videos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A process of its own: what other tests did to torch's threads changes last bits.
    alone = [sys.executable, "-m", "kineticlip", *words(videos, tmp_path / "one")]
    subprocess.run(alone, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    two = tmp_path / "two"
    parent = subprocess.Popen(
        [sys.executable, "-m", "kineticlip", *words(videos, two, "--num-processes", "2")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    part = two / "parts" / "0" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while parent.poll() is None and time.monotonic() < deadline:
        if part.exists() and part.read_bytes().count(b"\n") > 2:
            os.killpg(parent.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    assert parent.wait() == -signal.SIGKILL
    assert not (two / "summary.json").exists()
    capsys.readouterr()
    assert main(words(videos, two, "--num-processes", "2")) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert speed["processes"] == 2 and 0 < speed["videos"] < 24  # what was done stays done
    for name in ("results.parquet", "scores.safetensors"):
        assert (two / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    rows = read_journal(two / "journal.jsonl")[1:]
    names = [row["video"] for row in rows if "thumbnail" not in row]
    assert len(names) == len(set(names)) == 25
    assert not list((two / "parts").glob("[0-9]*"))
    assert len(list((two / "thumbnails").glob("*.jpg"))) >= 6
    assert main(words(videos, two, "--num-processes", "2", "--set", "data.num_frames=3")) == 2
    assert "belongs to another run" in capsys.readouterr().err


def write_journal(path: Path, *rows: dict[str, object], header: dict[str, object] = HEADER) -> None:
    journal = Journal(path, header)
    for row in rows:
        journal.append(row)
    journal.close()


def test_parts_are_merged_once_and_removed(tmp_path: Path) -> None:
    write_journal(tmp_path / "journal.jsonl", {"video": "a", "views": 6})
    for rank, name in enumerate("bc"):
        part = tmp_path / "parts" / str(rank)
        rows: list[dict[str, Any]]
        rows = [{"video": "a", "views": 5}, {"video": name, "views": 6},
                {"video": name, "thumbnail": 4}, {"video": "d", "reason": "gone"}]  # fmt: skip
        write_journal(part / "journal.jsonl", *rows)
        (part / "thumbnails").mkdir()
        (part / "thumbnails" / f"{rank}.jpg").write_bytes(b"picture")
    assert merge_parts(tmp_path) == 5
    assert finished_videos(tmp_path) == {"a", "b", "c"}
    rows = read_journal(tmp_path / "journal.jsonl")[1:]
    assert [row["views"] for row in rows if row["video"] == "a"] == [6]
    assert len(list((tmp_path / "thumbnails").glob("*.jpg"))) == 2
    assert merge_parts(tmp_path) == 0


def test_a_part_of_another_run_is_refused(tmp_path: Path) -> None:
    write_journal(tmp_path / "journal.jsonl", {"video": "a"})
    other = {"format": 1, "protocol": {"frames": 8}}
    write_journal(tmp_path / "parts" / "0" / "journal.jsonl", {"video": "b"}, header=other)
    for refuse in (
        lambda: merge_parts(tmp_path),
        lambda: check_same_run(tmp_path, tmp_path / "parts" / "0"),
    ):
        with pytest.raises(UserError, match=r"protocol.frames is 4 there and 8 here|is 8 there"):
            refuse()
    assert (tmp_path / "parts" / "0" / "journal.jsonl").exists()


def test_failures_are_one_line(tmp_path: Path) -> None:
    orders = []
    for rank, text in enumerate(("warning: x\nerror: list.txt: no such file\n", "")):
        part = tmp_path / str(rank)
        part.mkdir()
        (part / "messages.txt").write_text(text)
        made = Order(config={}, videos=("a",), out="", part=str(part), settings={}, parent=1)
        orders.append(made)
    assert Order.loaded(orders[0].dumped().decode()) == orders[0]
    assert _failures(orders, [2, -15]) == ["list.txt: no such file"]
    assert _failures(orders, [0, -9]) == ["process 1 was killed by signal 9; run again to go on"]
    assert _failures(orders, [0, 0]) == []


def test_more_processes_than_sense(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(videos, tmp_path / "out", "--num-processes", "0")) == 2
    assert "--num-processes should be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
