"""Evaluation protocols from the command line: pictures on disk to numbers in summary.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score

from kineticlip.__main__ import main
from kineticlip.config import Config, load_config
from kineticlip.data.entries import Entry
from kineticlip.data.few_shot import few_shot
from kineticlip.data.list_writer import write_few_shot
from kineticlip.data.lists import read_list
from kineticlip.evaluation import metrics
from kineticlip.evaluation.protocols import (
    PROTOCOLS,
    check_protocols,
    collect,
    over_splits,
    protocol_numbers,
)
from kineticlip.evaluation.results import read_results
from kineticlip.runtime.errors import UserError

CLASSES = ("red square", "blue circle", "green star", "white bar", "black dot", "grey ring")
TINY = (
    "model.arch=ViT-tiny-16", "data.resolution=64", "data.num_frames=2", "eval.precision=fp32",
    "text4vis.header=mean", "data.workers=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frame folders, two of each class, and their lists."""
    root = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(3)
    lines = []
    for number in range(12):
        (root / f"v{number}").mkdir()
        for frame in range(3):
            pixels = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"v{number}" / f"img_{frame + 1:05d}.jpg")
        lines.append(f"v{number} 3 {number % 6}")
    (root / "list.txt").write_text("\n".join(lines) + "\n")
    (root / "labels.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def run(capsys: pytest.CaptureFixture[str], *words: str, tiny: bool = True) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    options = [word for pair in TINY for word in ("--set", pair)] if tiny else []
    status = main([*words, *options])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def evaluation(videos: Path, out: Path, *words: str) -> list[str]:
    return [
        "eval", "--weights", "random", "--list", str(videos / "list.txt"),
        "--root", str(videos), "--labels", str(videos / "labels.txt"),
        "--out", str(out), "--thumbnails", "0", *words,
    ]  # fmt: skip


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    status, out, err = run(capsys, *words, "--json")
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_numbers_of_one_list(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--metrics", "zero-shot", "map", "official-padded", "--official-processes", "5")
    extra = document(capsys, *evaluation(videos, tmp_path, *words))["extra"]
    results = read_results(tmp_path)
    assert results.summary["extra"] == extra
    scores = load_file(tmp_path / "scores.safetensors")["scores"]
    labels = np.arange(12) % 6
    expected = metrics.zero_shot(scores, labels)
    assert extra["zero_shot_top1"] == results.summary["top1"]
    assert extra["half_classes_top1_mean"] == pytest.approx(np.mean(expected.half_top1))
    assert extra["half_classes_top5_std"] == pytest.approx(np.std(expected.half_top5))
    assert len(extra["half_classes_top1"].split(", ")) == 10
    each = [average_precision_score(labels == c, scores[:, c]) for c in range(6)]
    assert extra["map"] == pytest.approx(100 * np.mean(each))
    assert extra["map_official"] == metrics.official_mean_average_precision(scores, labels)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    padded = order + order[:3]  # 5 processes, 3 videos each
    hits = scores.argmax(axis=1) == labels
    assert extra["official_padded_top1"] == pytest.approx(100 * hits[padded].mean())

    status, out, _ = run(capsys, *evaluation(videos, tmp_path, *words))  # it goes on from there
    assert status == 0
    assert f"map official: {extra['map_official']:.2f} %" in out
    assert "half classes top1 mean: " in out and "official padded processes: 5" in out


def test_clips_and_crops(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for crops, clips, mode in (
        (1, 1, "uniform"),
        (3, 2, "uniform"),
        (5, 2, "dense"),
        (10, 1, "dense"),
    ):
        words = (
            "--set", f"test.crops={crops}", "--set", f"test.clips={clips}",
            "--set", f"test.sampling={mode}", "--limit", "2",
        )  # fmt: skip
        found = document(capsys, *evaluation(videos, tmp_path / f"{crops}{clips}{mode}", *words))
        assert found["scored"] == 2 and found["views"] == 2 * crops * clips


def test_several_splits_give_mean_and_deviation(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--weights", "random", "--root", str(videos), "--out", str(tmp_path / "out")]
    for number in range(3):
        listing = tmp_path / f"list{number}.txt"
        chosen = [n for n in range(12) if n % 6 in range(number, number + 3)]
        listing.write_text("".join(f"v{n} 3 {n % 6 - number}\n" for n in chosen))
        names = tmp_path / f"labels{number}.txt"
        names.write_text("\n".join(CLASSES[number : number + 3]))
        words += ["--split", str(listing), str(names)]
    found = document(capsys, *words, "--metrics", "map")
    assert json.loads((tmp_path / "out" / "splits.json").read_text())["splits"] == found["splits"]
    summaries = [read_results(tmp_path / "out" / f"split{n}").summary for n in (1, 2, 3)]
    assert [summary["class_names"] for summary in summaries] == [
        list(CLASSES[number : number + 3]) for number in range(3)
    ]
    for name, values in {
        "top1": [summary["top1"] for summary in summaries],
        "map": [summary["extra"]["map"] for summary in summaries],
    }.items():
        combined = found["over_splits"][name]
        assert combined["values"] == values
        assert combined["mean"] == pytest.approx(np.mean(values))
        assert combined["std"] == pytest.approx(np.std(values))
    status, out, _ = run(capsys, *words)
    assert status == 2  # kept scores are part of what a folder was begun with
    status, out, _ = run(capsys, *words, "--metrics", "map")
    assert status == 0 and "+-" in out and "split 3: " in out
    status, _, err = run(capsys, *words, "--labels", "kinetics-400")
    assert status == 2 and "--split comes with its own list" in err


def test_several_labels_a_video(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = tmp_path / "charades.csv"
    rows = ["v0,c000 1 2;c003 0 1,9", "v1,c001 0 1,9", "v2,,9", "v3,c003 0 1;c005 0 2;c003 4 5,9"]
    listing.write_text("id,actions,length\n" + "\n".join(rows) + "\n")
    words = evaluation(videos, tmp_path / "out", "--metrics", "multilabel", "--official-batch", "2")
    words[words.index("--list") + 1] = str(listing)
    found = document(capsys, *words)
    scores = load_file(tmp_path / "out" / "scores.safetensors")["scores"]
    targets = np.zeros((4, 6), dtype=bool)
    for row, classes in enumerate(([0, 3], [1], [], [3, 5])):
        targets[row, classes] = True
    each = [average_precision_score(targets[:, c], scores[:, c]) for c in (0, 1, 3, 5)]
    extra = found["extra"]
    assert extra["map_multilabel"] == pytest.approx(100 * np.mean(each))
    assert extra["map_multilabel_official"] == metrics.official_running_mean_average_precision(
        scores, targets, batch_size=2
    )
    assert found["scored"] == 4 and found["top1"] is None
    status, out, _ = run(capsys, *words)
    assert status == 0 and "map multilabel: " in out
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html")]) == 0
    words[words.index("multilabel")] = "map"
    status, _, err = run(capsys, *words)
    assert status == 2 and err == "error: --metrics map: needs a list with one label a video\n"


def test_unreadable_videos_are_left_out_of_every_number() -> None:
    scores = np.array([[0.9, 0.1], [np.nan, np.nan], [0.2, 0.8]], dtype=np.float32)
    entries = [Entry("a", "a", 0), Entry("b", "b", 0), Entry("c", "c", 0)]
    found = collect(scores, entries, world_size=1, batch_size=1)
    assert protocol_numbers(["official-padded"], found)["official_padded_top1"] == 50
    with pytest.raises(UserError, match="no video could be scored"):
        collect(scores[1:2], entries[1:2], world_size=1, batch_size=1)
    with pytest.raises(UserError, match=r"--metrics mapp: unknown\. Did you mean 'map'\?"):
        check_protocols(["mapp"], entries, num_classes=2)
    with pytest.raises(UserError, match="half-class split 0 of 9 classes holds none of the 3"):
        check_protocols(["zero-shot"], entries, num_classes=9)
    with pytest.raises(UserError, match="multilabel: no video of the list has a label"):
        check_protocols(["multilabel"], [Entry("a", "a", -1, labels=())], num_classes=2)


def test_the_command_knows_every_protocol() -> None:
    from kineticlip.commands.eval import METRICS

    assert METRICS == tuple(PROTOCOLS)


def test_splits_without_a_number_have_no_mean_of_it() -> None:
    plain = {"top1": None, "top5": 50.0, "mean_class_accuracy": 1.0, "extra": {"note": "x"}}
    assert set(over_splits([plain, {**plain, "top1": 3.0}])) == {"top5", "mean_class_accuracy"}


def test_few_shot_lists_are_lists_again(tmp_path: Path) -> None:
    lines = "".join(f'"clip {n}" {9 + n} {n % 3}\n' for n in range(12))
    (tmp_path / "train.txt").write_text(lines)
    entries = read_list(tmp_path / "train.txt", tmp_path).entries
    chosen = few_shot(entries, 2, 7)
    assert len(chosen) == 12 and few_shot(entries, 2, 7) == chosen != few_shot(entries, 2, 8)
    path = write_few_shot(Config(output=str(tmp_path / "run")), chosen)
    assert path == tmp_path / "run" / "few_shot.txt"
    again = read_list(path, tmp_path).entries
    assert len(again) == 6 and {(e.name, e.label) for e in again} == {
        (e.name, e.label) for e in chosen
    }
    assert write_few_shot(Config(output=str(tmp_path / "run")), chosen) == path
    with pytest.raises(UserError, match="another run's few-shot videos"):
        write_few_shot(Config(output=str(tmp_path / "run")), few_shot(entries, 2, 8))


def failure(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> str:
    """The one line of a command that must fail with status 2 and write nothing."""
    status, stdout, err = run(capsys, *words)
    assert (status, stdout) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not out.exists() or not [path for path in out.rglob("*") if path.is_file()]
    return err


def test_checkpoints_that_do_not_fit(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = evaluation(videos, out)
    place = words.index("random")
    config = tmp_path / "config.yaml"
    config.write_text("name: tiny\n")
    words += ["--config", str(config)]
    whole = tmp_path / "whole.pt"
    torch.save({"model_state_dict": {"visual.proj": torch.zeros(9, 9)}}, whole)
    words[place] = str(tmp_path / "torn.pt")
    Path(words[place]).write_bytes(whole.read_bytes()[:300])
    assert "torn.pt" in failure(capsys, out, *words)
    words[place] = str(tmp_path / "foreign.pt")
    torch.save({"state_dict": {"backbone.layer.0.weight": torch.zeros(3)}}, words[place])
    assert "foreign.pt: of no known format" in failure(capsys, out, *words)
    words[place] = str(tmp_path / "absent.pt")
    assert "no such file" in failure(capsys, out, *words)


def test_a_checkpoint_of_another_size(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, path = tmp_path / "out", tmp_path / "other.pt"
    recorded = Path(__file__).parents[1] / "golden" / "text4vis" / "clip_vit_base.safetensors"
    from safetensors.torch import load_file as load

    state = {k: t for k, t in load(recorded).items() if k.startswith(("visual", "logit"))}
    torch.save({"epoch": 1, "model_state_dict": state}, path)
    words = evaluation(videos, out, "--config", str(tmp_path / "config.yaml"))
    (tmp_path / "config.yaml").write_text("name: tiny\n")
    words[words.index("random")] = str(path)
    assert "does not fit VisionTransformer" in failure(capsys, out, *words)


def test_lists_and_labels_that_do_not_fit(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    few = tmp_path / "few.txt"
    few.write_text("\n".join(CLASSES[:4]))
    words = evaluation(videos, out)
    words[words.index("--labels") + 1] = str(few)
    line = failure(capsys, out, *words)
    assert "list.txt:5: label 4 is out of range: expected 0..3" in line
    empty = tmp_path / "empty.txt"
    empty.write_text("v0 0 1\nv1 0 2\n")
    words = evaluation(videos, out)
    words[words.index("--list") + 1] = str(empty)
    line = failure(capsys, out, *words)
    assert "no video to score" in line and "2 without frames left out" in line
    empty.write_text("v0 0 1\nv1 3 1\nv2 0 2\n")
    status, stdout, err = run(capsys, *words)
    assert status == 0 and "2 without frames left out (v0, ...)" in err
    assert "entries without frames: 2" in stdout and "1 video of 6 classes" in stdout
    assert read_results(out).summary["videos"] == 1
    words[words.index("--list") + 1] = str(videos / "list.txt")
    words += ["--fresh", "--set", "data.val_min_frames=4"]
    status, _, err = run(capsys, *words)
    assert status == 2 and "12 with fewer than 4 frames left out" in err


def test_a_classifier_file_of_other_classes(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = tmp_path / "rows.safetensors"
    few = tmp_path / "few.txt"
    few.write_text("\n".join(CLASSES[:4]))
    status, _, err = run(
        capsys, "classifier", "build", "random_normal", "--labels", str(few),
        "--out", str(built),
    )  # fmt: skip
    assert status == 0, err
    words = evaluation(videos, tmp_path / "out", "--set", f"classifier.source={built}")
    line = failure(capsys, tmp_path / "out", *words)
    assert "no row for 2 of 6 classes" in line


def train_config(videos: Path, folder: Path, shots: int) -> Path:
    path = folder / "train.yaml"
    path.write_text(
        f"output: {folder / 'run'}\n"
        f"data:\n  train_list: {videos / 'list.txt'}\n  train_root: {videos}\n"
        f"  labels: {videos / 'labels.txt'}\n  shots: {shots}\n"
        "  resolution: 64\n  num_frames: 2\n  workers: 1\n"
        "model:\n  arch: ViT-tiny-16\n  weights: random\n"
        "text4vis:\n  header: mean\n"
        "train:\n  epochs: 1\n  batch_size: 6\n  micro_batch_size: 6\n  precision: fp32\n"
        "optim:\n  warmup_epochs: 0\n"
    )
    return path


def test_a_few_shot_run_lists_its_videos_and_can_be_evaluated(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process of its own: DeepSpeed keeps its process groups for good."""
    config = train_config(videos, tmp_path, 1)
    command = [sys.executable, "-m", "kineticlip", "train", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    listed = read_list(tmp_path / "run" / "few_shot.txt", videos).entries
    chosen = few_shot(read_list(videos / "list.txt", videos).entries, 1, Config().seed)
    assert len(listed) == 6 and {e.name for e in listed} == {e.name for e in chosen}
    assert "2 steps; weights:" in done.stdout
    words = evaluation(videos, tmp_path / "out", "--metrics", "zero-shot")
    words[words.index("random")] = str(tmp_path / "run" / "weights.safetensors")
    status, out, err = run(capsys, *words, "--json", tiny=False)
    assert status == 0, err
    found = json.loads(out)
    assert found["scored"] == 12 and found["extra"]["zero_shot_top1"] == found["top1"]


def test_more_shots_than_a_class_has(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config(videos, tmp_path, 3)
    line = failure(capsys, tmp_path / "run", "train", "--config", str(config))
    assert "data.shots=3: class 0 has only 2 videos (v0, ...)" in line
    assert load_config(config).data.shots == 3
