"""An evaluation that is killed ten times ends with the result files of an unbroken one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kineticlip.__main__ import main
from kineticlip.commands.demo.clips import render_clip, write_clip

VIDEOS, KILLS = 60, 10
PAUSE = 0.01  # seconds before every row, so that no run ends before it is killed
LONGEST_DELAY = 0.02  # seconds after a row appeared: the next videos are being scored or written


def words_for(root: Path, out: str) -> list[str]:
    return [
        "eval", "--weights", "random", "--set", "model.arch=ViT-tiny-16",
        "--set", "data.resolution=64", "--set", "data.num_frames=4", "--set", "test.clips=2",
        "--set", "test.crops=3", "--set", "eval.precision=fp32", "--set", "data.workers=1",
        "--set", "classifier.text_weights=random", "--set", "classifier.source=random_normal",
        "--labels", str(root / "labels.txt"), "--list", str(root / "list.txt"),
        "--root", str(root), "--out", str(root / out), "--deterministic", "--scores", "--json",
    ]  # fmt: skip


def run(words: list[str]) -> None:
    """A process of its own: as the console script, but with the imports done already."""
    from kineticlip.evaluation.result_writer import ResultWriter

    add = ResultWriter.add

    def slowly(writer: ResultWriter, *given: Any, **facts: Any) -> None:
        time.sleep(PAUSE)
        add(writer, *given, **facts)

    pytest.MonkeyPatch().setattr(ResultWriter, "add", slowly)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    raise SystemExit(main(words))


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Forks of a server that has imported torch once; it runs with one thread, as they do."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["kineticlip.evaluation.recognizer", "kineticlip.evaluation.results", __name__]
    )
    process = context.Process(target=int)  # starts the server
    process.start()
    process.join()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty names of three short clips, one of them broken, in a list."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        write_clip(
            folder / f"clip{number}.mp4",
            render_clip(number, number, np.random.default_rng(number))[:8],
        )
    (folder / "broken.mp4").write_text("not a video")
    lines = []
    for number in range(VIDEOS):
        source = "broken" if number % 20 == 7 else f"clip{number % 3}"
        (folder / f"copy{number}.mp4").symlink_to(folder / f"{source}.mp4")
        lines.append(f"copy{number}.mp4 {number % 3}\n")
    (folder / "list.txt").write_text("".join(lines))
    (folder / "labels.txt").write_text("moving left\nmoving right\ngrowing\n")
    return folder


def test_ten_kills_leave_the_rows_of_an_unbroken_run(
    root: Path, processes: ForkServerContext
) -> None:
    rng = random.Random(5)
    goals = sorted(rng.sample(range(1, VIDEOS - 20), KILLS))  # lines of the journal
    whole = processes.Process(target=run, args=(words_for(root, "whole"),))
    whole.start()
    whole.join(120)
    assert whole.exitcode == 0
    journal = root / "killed" / "journal.jsonl"
    for goal in goals:
        process = processes.Process(target=run, args=(words_for(root, "killed"),))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") > goal:
                break
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, LONGEST_DELAY))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"ended before it was killed at {goal}"
    last = processes.Process(target=run, args=(words_for(root, "killed"),))
    last.start()
    last.join(120)
    assert last.exitcode == 0

    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    scored = [row["video"] for row in rows if "thumbnail" not in row]
    assert sorted(scored) == sorted(f"copy{number}.mp4" for number in range(VIDEOS))
    for name in ("results.parquet", "scores.safetensors"):
        assert (root / "killed" / name).read_bytes() == (root / "whole" / name).read_bytes(), name
