"""Vita-CLIP on a Text4Vis recipe by one switch: trained, stopped, resumed, evaluated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from kineticlip.__main__ import main

RECIPE = Path(__file__).parents[2] / "configs" / "k400-text4vis-vitb16-f8.yaml"
CLASSES = ("red square", "blue circle", "green star")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six frame folders, two of each class, and their lists."""
    root = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(3)
    for number in range(6):
        (root / f"v{number}").mkdir()
        for frame in range(6):
            pixels = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"v{number}" / f"img_{frame + 1:05d}.jpg")
    lines = [f"v{number} 6 {number % 3}\n" for number in range(6)]
    (root / "list.txt").write_text("".join(lines))
    (root / "labels.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def changes(videos: Path, out: Path) -> list[str]:
    pairs = (
        "method=vitaclip", "model.arch=ViT-tiny-16", "model.weights=random", f"output={out}",
        f"data.train_list={videos}/list.txt", f"data.train_root={videos}",
        f"data.val_list={videos}/list.txt", f"data.val_root={videos}",
        f"data.labels={videos}/labels.txt", "data.resolution=64", "data.num_frames=2",
        "data.min_frames=0", "data.workers=1", "test.clips=2", "optim.lr=1e-2",
        "optim.warmup_epochs=0", "train.steps=4", "train.batch_size=4",
        "train.micro_batch_size=2", "train.precision=fp32", "train.checkpoint_every=2",
        "train.log_every=1", "train.keep_checkpoints=4", "eval.precision=fp32",
    )  # fmt: skip
    return [word for pair in pairs for word in ("--set", pair)]


def train(videos: Path, out: Path) -> None:
    command = [sys.executable, "-m", "kineticlip", "train", "--config", str(RECIPE)]
    done = subprocess.run(
        [*command, *changes(videos, out)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(videos, out)
    return out


def test_a_stopped_run_goes_on_to_the_same_weights(
    videos: Path, trained: Path, tmp_path: Path
) -> None:
    whole = load_file(trained / "weights.safetensors")
    before = losses(trained)
    assert len(before) == 4
    kept = tmp_path / "kept"
    shutil.copytree(trained, kept)
    for name in ("finished.json", "weights.safetensors"):
        (trained / name).unlink()
    shutil.rmtree(trained / "checkpoints" / "step-00000004")
    train(videos, trained)
    assert losses(trained)[-2:] == before[-2:]
    again = load_file(trained / "weights.safetensors")
    assert whole.keys() == again.keys()
    assert all(whole[name].equal(again[name]) for name in whole)
    start = load_file(kept / "weights.safetensors")
    assert "prompt_learner.tokens" in start and "prompts.time_embed" in start


def test_it_is_evaluated_and_reported(
    videos: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = str(trained / "weights.safetensors"), str(tmp_path / "eval")
    assert main(["eval", "--weights", weights, "--out", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["scored"], found["classes"], found["protocol"]["method"]) == (6, 3, "vitaclip")
    assert main(["report", out, "--out", str(tmp_path / "page.html")]) == 0
    assert "vitaclip" in (tmp_path / "page.html").read_text()
    other = tmp_path / "other.txt"
    other.write_text("red square\ngreen star\nblue circle\n")
    words = ["eval", "--weights", weights, "--labels", str(other), "--out", str(tmp_path / "zs")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "learned words for 3 other classes" in error and error.count("\n") == 1
    zero_shot = ["--set", "vitaclip.text=classifier", "--set", "classifier.template=name"]
    assert main([*words, *zero_shot, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scored"] == 6
