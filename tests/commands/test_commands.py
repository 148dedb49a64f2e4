"""The console script as a user meets it: results, and one line with status 2 for a mistake."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kineticlip.__main__ import COMMANDS, build_parser, main
from kineticlip.commands.demo.clips import render_clip, write_clip, write_start_weights
from kineticlip.config import load_config
from kineticlip.formats.trained import export_weights
from kineticlip.methods import METHODS
from kineticlip.models.architectures import VisionShape, architecture
from kineticlip.models.text import text_tower
from kineticlip.models.vision import VisionTransformer

TINY = ["--set", "model.arch=ViT-tiny-16", "--set", "data.resolution=64"]
UNTRAINED = ["--weights", "random", *TINY, "--set", "eval.precision=fp32"]
HEADLINE = str(Path(__file__).parents[2] / "configs/k400-text4vis-vitl14_336-f32.yaml")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips, a list of them, their labels, and a file that is no video."""
    root = tmp_path_factory.mktemp("clips")
    lines = []
    for number in range(6):
        frames = render_clip(number, number, np.random.default_rng(number))
        write_clip(root / f"clip{number}.mp4", frames)
        lines.append(f"clip{number}.mp4 {number % 3}\n")
    (root / "list.txt").write_text("".join(lines))
    (root / "labels.txt").write_text("moving left\nmoving right\ngrowing\n")
    (root / "broken.mp4").write_text("not a video")
    return root


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser(name).parse_args([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out.replace("\\\n", "")  # long examples go on in the next line
    example = next(line for line in shown.splitlines() if line.startswith(f"  kineticlip {name} "))
    program, *words = shlex.split(example)
    assert program == "kineticlip"
    build_parser(name).parse_args(words)  # exits where an option is not there


def test_help_does_not_import_torch() -> None:
    code = "import sys; from kineticlip.__main__ import build_parser; build_parser('eval');"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_predict_prints_one_document(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("predict", str(clips / "clip0.mp4"), "--labels", "a, b, c", *UNTRAINED, "--json")
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["untrained"] is True and document["frames"] == 12
    assert {row["label"] for row in document["ranking"]} == {"a", "b", "c"}
    scores = [row["probability"] for row in document["ranking"]]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-5)


def test_predict_marks_untrained_weights(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("predict", str(clips / "clip0.mp4"), "--labels", "a, b", *UNTRAINED)) == 0
    out = capsys.readouterr().out
    assert out.startswith("UNTRAINED") and "12 frames" in out and "1  " in out


def test_predict_with_clip_as_it_was_published(
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CLIP file needs no configuration, and its own text tower encodes the names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny = architecture("ViT-tiny-16")
    assert isinstance(tiny.vision, VisionShape)
    visual = VisionTransformer(tiny.vision).state_dict()
    state = {f"visual.{name}": value for name, value in visual.items()}
    state |= {**text_tower(tiny.text, None, seed=7).state_dict(), "logit_scale": torch.zeros(())}
    torch.save(state, tmp_path / "clip.pt")
    words = ["predict", str(clips / "clip0.mp4"), "--labels", "a, b", "--json"]
    assert main([*words, "--weights", str(tmp_path / "clip.pt")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["arch"], document["untrained"]) == ("ViT-tiny-16", False)
    line = error_of(capsys, *words, "--labels", "a, b, a")
    assert line == "error: --labels: class 'a' is listed twice"


def test_predict_names_a_bad_file(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "predict", str(clips / "broken.mp4"), "--labels", "a, b", *UNTRAINED)
    assert "broken.mp4" in line
    line = error_of(capsys, "predict", str(clips / "none.mp4"), "--labels", "a, b", *UNTRAINED)
    assert "none.mp4" in line and "no such file" in line


def evaluate(clips: Path, out: Path, *more: str) -> list[str]:
    return [
        "eval", *UNTRAINED, "--set", "test.clips=2", "--set", "test.crops=3",
        "--set", "data.num_frames=4", "--list", str(clips / "list.txt"), "--root", str(clips),
        "--labels", str(clips / "labels.txt"), "--out", str(out), *more,
    ]  # fmt: skip


def test_eval_counts_and_names_bad_files(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text((clips / "list.txt").read_text() + "broken.mp4 0\n")
    words = evaluate(clips, tmp_path / "out", "--list", str(listing), "--json")
    assert main(words) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["videos"], summary["scored"], summary["bad"]) == (7, 6, 1)
    assert summary["protocol"]["weights"] == "untrained"
    assert summary["views"] == 36
    assert 0 < summary["speed"]["percent_of_model_speed"]
    assert (tmp_path / "out" / "results.parquet").is_file()
    assert main(evaluate(clips, tmp_path / "out", "--list", str(listing))) == 0
    assert "UNTRAINED" in capsys.readouterr().out


def test_int8_tells_its_price(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = evaluate(clips, tmp_path / "out", "--set", "eval.precision=int8", "--limit", "2")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "int8 against bf16 on one view of 2 videos: top-1 equal in 100 %" in out
    assert "int8 on cpu, layers packed by oneDNN; 16 images a forward" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0 < summary["extra"]["int8"]["score_difference"] < 0.05
    assert main(words) == 0  # nothing is left to score: what was measured stays
    again = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (again["extra"], again["speed"]) == (summary["extra"], summary["speed"])


def test_eval_goes_on_only_over_the_same_files(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(evaluate(clips, out)) == 0
    (tmp_path / "same").symlink_to(clips)
    assert main([*evaluate(clips, out), "--root", str(tmp_path / "same")]) == 0
    capsys.readouterr()
    line = error_of(capsys, *evaluate(clips, out), "--root", str(tmp_path))
    assert "belongs to another run: root is" in line and "\n" not in line.strip()


def test_eval_tries_bad_videos_again_and_fails_where_all_are(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "videos", tmp_path / "out"
    root.mkdir()
    words = [*evaluate(clips, out), "--root", str(root)]
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "no video could be read; is --root right?" in shown and "6 x no such file" in shown
    (root / "clip0.mp4").write_bytes((clips / "clip0.mp4").read_bytes())
    assert main([*words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["scored"], summary["bad"]) == (1, 5)
    assert main([*words, "--json"]) == 0  # the bad ones once more, and nothing else
    again = json.loads(capsys.readouterr().out)
    assert (again["scored"], again["speed"]) == (1, summary["speed"])
    rows = (out / "journal.jsonl").read_text().splitlines()[1:]
    assert sum("reason" in row for row in rows) == 6
    assert sum("views" in row for row in rows) == 1


def test_eval_takes_over_what_processes_left(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(evaluate(clips, one)) == 0
    part = two / "parts" / "0"
    part.mkdir(parents=True)
    lines = (one / "journal.jsonl").read_text().splitlines(keepends=True)
    scored = [line for line in lines[1:] if "views" in line]
    (part / "journal.jsonl").write_text("".join([lines[0], *scored[:4]]))
    capsys.readouterr()
    error_of(capsys, *evaluate(clips, two), "--fresh", "--weights", "none.pt")
    assert part.exists()  # a mistake deletes nothing
    assert main([*evaluate(clips, two), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["speed"]["videos"] == len(scored) - 4
    assert (two / "results.parquet").read_bytes() == (one / "results.parquet").read_bytes()
    assert not part.exists()


def test_eval_scores_a_repeated_video_once_and_counts_files_read_in_sequence(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "old.avi", render_clip(0, 0, np.random.default_rng(0)))
    listing, out = tmp_path / "list.txt", tmp_path / "out"
    names = ["clip0.mp4 0", f"{tmp_path / 'old.avi'} 1", "clip0.mp4 0", "clip1.mp4 1"]
    listing.write_text("\n".join(names))
    assert main(evaluate(clips, out, "--list", str(listing))) == 0
    shown = capsys.readouterr().out
    assert "decoded by pyav 4" in shown and "lines of the list that repeat a video: 1" in shown
    assert "1 of them read in sequence: h264 in avi is always decoded in sequence" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["scored"], summary["speed"]["videos"]) == (4, 3)
    rows = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()[1:]]
    scored = [row["video"] for row in rows if "views" in row]
    assert sorted(scored) == sorted({name.split()[0] for name in names})


def test_labels_stand_in_for_the_label_file_of_an_official_yaml(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = tmp_path / "official.yaml"
    official.write_text(
        "data:\n  label_list: lists/elsewhere.csv\n  input_size: 64\n  num_segments: 2\n"
        "network:\n  arch: ViT-tiny-16\n  init: True\nsolver:\n  epochs: 1\n"
    )
    words = [
        "eval", "--config", str(official), "--weights", "random", "--list",
        str(clips / "list.txt"), "--root", str(clips), "--set", "eval.precision=fp32",
        "--out", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    line = error_of(capsys, *words)
    assert "lists/elsewhere.csv: no such label file" in line
    assert main([*words, "--labels", str(clips / "labels.txt")]) == 0
    names = json.loads(capsys.readouterr().out)["class_names"]
    assert names == ["moving left", "moving right", "growing"]
    # Centred rows do depend on the classes of training.
    line = error_of(
        capsys, *words, "--labels", str(clips / "labels.txt"), "--set", "classifier.center=true"
    )
    assert "lists/elsewhere.csv: no such label file" in line


def test_untrained_parts_are_refused(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = str(write_start_weights(tmp_path / "start.safetensors"))
    line = error_of(
        capsys, "eval", "--config", HEADLINE, *TINY, "--weights", start,
        "--list", str(clips / "list.txt"), "--root", str(clips),
        "--labels", str(clips / "labels.txt"), "--out", str(tmp_path / "out"),
        "--set", "classifier.text_weights=random",
    )  # fmt: skip
    assert "no trained weights for fusion_model" in line and "random" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--set", "data.num_frame=3"), "unknown key 'data.num_frame'. Did you mean 'num_frames'"),
        (("--set", "data.num_frames=x"), "'data.num_frames': input should be a valid integer"),
        (("--list", "none.txt"), "none.txt"),
        (("--labels", "none.txt"), "none.txt"),
        (("--set", "method=text4viz"), "Did you mean 'text4vis'"),
        (("--set", "model.arch=ViT-tiny-61"), "ViT-tiny-16"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    expected: str,
) -> None:
    assert expected in error_of(capsys, *evaluate(clips, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_list_line_with_the_wrong_fields_is_named(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("clip0.mp4 0\nclip1.mp4\n")
    line = error_of(capsys, *evaluate(clips, tmp_path / "out", "--list", str(listing)))
    assert f"{listing}:2" in line
    assert not (tmp_path / "out").exists()


def test_weights_bring_their_class_names_along(
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = (*TINY[1::2], "model.weights=random", "data.labels=labels.txt", "data.num_frames=4")
    config = load_config(None, [*pairs, "text4vis.header=mean", "classifier.source=random_normal"])
    names = ("moving left", "moving right", "growing")
    model = METHODS["text4vis"].build(config, names)
    weights = tmp_path / "weights.safetensors"
    export_weights(
        weights, model.state_dict(), config=config, class_names=names, step=1, classifier={}
    )
    monkeypatch.chdir(tmp_path)  # no labels.txt here
    listed = ("--list", str(clips / "list.txt"), "--root", str(clips), "--out", "out", "--json")
    assert main(["eval", "--weights", str(weights), *listed]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == 3
    show = ("predict", str(clips / "clip0.mp4"), "--weights", str(weights), "--json")
    assert main(show) == 0
    ranking = json.loads(capsys.readouterr().out)["ranking"]
    assert {row["label"] for row in ranking} == set(names)
    assert main([*show, "--labels", "growing,something else"]) == 0  # of trained and new classes
    ranking = json.loads(capsys.readouterr().out)["ranking"]
    assert {row["label"] for row in ranking} == {"growing", "something else"}
    assert "none.txt" in error_of(capsys, *show, "--labels", "none.txt")
    write_start_weights(Path("start.safetensors"))
    line = error_of(capsys, *show, "--labels", "start.safetensors")
    assert "carry no class names" in line
