"""Training by the real deepspeed launcher: two ranks, all stages, killed and gone on with.

Each start of the launcher takes some ten seconds, so each does as much as it can.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from kineticlip.__main__ import main
from kineticlip.formats.trained import load_weights
from kineticlip.runtime.distributed import free_port
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.launch import device_words
from toy_training import plain_torch, rows, toy_config

PROGRAM = Path(__file__).parents[1] / "toy_training.py"
LIMIT = 150  # seconds; a start takes 8 on an idle core, and collectives may not hang
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
REFERENCE = {"train": {"zero_stage": 2, "gradient_clipping": 0.5}}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command in a process group of its own, of which nothing survives the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        kill(process, signal.SIGKILL)
        process.communicate()


def kill(process: subprocess.Popen[str], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def program(plan: dict[str, Any]) -> list[str]:
    """The toy's rank program under the launcher, two ranks."""
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "2",
        "--master_port", str(free_port()), "--no_local_rank", str(PROGRAM), json.dumps(plan),
    ]  # fmt: skip


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Returns once a run has written so many lines of metrics."""
    deadline = time.monotonic() + LIMIT
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        try:
            process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"ended before it wrote {count} rows: {process.communicate()}")


def steps(output: Path) -> list[Path]:
    return sorted((output / "checkpoints").glob("step-*"))


def test_two_ranks_at_every_stage_and_after_a_kill(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Two ranks follow plain torch at stages 0-3, parameters really split at stage 3; and a run
    whose processes are all killed with SIGKILL goes on to the same bits, dropout included."""
    split = tmp_path / "split.json"
    split.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    stages = [
        {
            "output": str(tmp_path / f"stage{stage}"),
            "train": {"zero_stage": stage, "deepspeed": str(split)},
            "drop_out": 0.0,
        }
        for stage in range(4)
    ]
    whole = {"output": str(tmp_path / "whole"), **REFERENCE}
    both = start(*program({"runs": [*stages, whole]}))
    out, errors = both.communicate(timeout=LIMIT)
    assert (both.returncode, out) == (0, "done\n"), errors
    losses, model = plain_torch(toy_config(tmp_path))
    for stage in range(4):
        found = [row["loss"] for row in rows(tmp_path / f"stage{stage}")]
        assert found == pytest.approx(losses, abs=2e-6), stage
        weights = load_weights(tmp_path / f"stage{stage}" / "weights.safetensors").tensors
        assert weights["scale"].shape == ()
        for name, tensor in model.state_dict().items():
            difference = (weights[name] - tensor).abs().max().item()
            assert difference < 2e-6, (stage, name)

    broken = tmp_path / "broken"
    plan = {"runs": [{"output": str(broken), **REFERENCE}], "delay": 0.1}
    first = start(*program(plan))
    wait_for_rows(broken / "metrics.jsonl", 6, first)  # the header and five of eight steps
    kill(first, signal.SIGKILL)
    first.wait()
    assert not (broken / "finished.json").exists()
    assert steps(broken)[-1].name == "step-00000003"
    again = start(*program({**plan, "delay": 0.0}))
    out, errors = again.communicate(timeout=LIMIT)
    assert (again.returncode, out) == (0, "done\n"), errors
    assert rows(broken) == rows(tmp_path / "whole")
    ours, theirs = (
        load_weights(path / "weights.safetensors") for path in (broken, tmp_path / "whole")
    )
    assert all(tensor.equal(theirs.tensors[name]) for name, tensor in ours.tensors.items())


RECIPE = """
name: tiny
model: {arch: ViT-tiny-16, weights: random}
classifier: {source: random_orthogonal}
data: {num_frames: 2, resolution: 64, augmentation: none, workers: 1, flip: false}
text4vis: {header: mean}
optim: {lr: 1.0e-3, clip_ratio: 1.0, warmup_epochs: 1}
train:
  {epochs: 6, batch_size: 8, micro_batch_size: 2, precision: bf16, checkpoint_every: 2,
   eval_every: 3, log_every: 1}
eval: {precision: fp32}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """Options of a run over 16 folders of two pictures, light ones and dark ones."""
    lines = []
    for number in range(16):
        folder = tmp_path / "clips" / f"{number:02d}"
        folder.mkdir(parents=True)
        for frame in (1, 2):
            grey = 40 + 150 * (number % 2) + number + frame
            Image.new("RGB", (64, 64), (grey, grey, grey)).save(folder / f"img_{frame:05d}.jpg")
        lines.append(f"{number:02d} 2 {number % 2}")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    (tmp_path / "labels.txt").write_text("dark\nlight\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    values = {
        "output": tmp_path / "out",
        "data.train_list": tmp_path / "list.txt",
        "data.val_list": tmp_path / "list.txt",
        "data.train_root": tmp_path / "clips",
        "data.val_root": tmp_path / "clips",
        "data.labels": tmp_path / "labels.txt",
    }
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    return ["train", "--config", str(tmp_path / "recipe.yaml"), *sets]


def test_the_command_starts_ranks_ends_them_and_goes_on(
    tmp_path: Path, recipe: list[str], start: Callable[..., subprocess.Popen[str]]
) -> None:
    command = [sys.executable, "-m", "kineticlip", *recipe, "--num-processes", "2"]
    out = tmp_path / "out"
    first = start(*command)
    wait_for_rows(out / "metrics.jsonl", 4, first)
    below = psutil.Process(first.pid).children(recursive=True)
    assert len(below) >= 4  # the launcher, its child, and two ranks
    first.terminate()  # this process alone, as `kill` and container runtimes do
    assert first.wait(timeout=LIMIT) == 128 + signal.SIGTERM, first.communicate()
    _, alive = psutil.wait_procs(below, timeout=10)
    assert alive == []
    assert not (out / "finished.json").exists()

    second = start(*command)
    printed, errors = second.communicate(timeout=LIMIT)
    assert second.returncode == 0, errors
    assert "12 steps; weights: " in printed
    assert [row["step"] for row in rows(out)] == list(range(1, 13))
    assert [row["step"] for row in rows(out, "eval")] == [6, 12]
    last = rows(out, "eval")[-1]
    assert (last["videos"], last["unreadable"]) == (16, 0)
    assert last["top1"] == 100.0  # brightness is easily learnt
    weights = load_weights(out / "weights.safetensors")
    assert (weights.class_names, weights.step) == (("dark", "light"), 12)
    assert weights.classifier["source"] == "random_orthogonal"


def test_a_finished_run_is_left_as_it_is(
    tmp_path: Path, recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "finished.json").write_text("{}")
    assert main([*recipe, "--num-processes", "2"]) == 0
    assert "the run is finished; weights: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train_list="], "data.train_list is not set"),
        (["data.train_list=absent.txt"], "absent.txt: no such list file"),
        (["data.labels="], "data.labels is not set"),
        (["train.epoch=3"], "unknown key 'train.epoch'. Did you mean 'epochs'?"),
        (["method=text4viz"], "method: unknown method 'text4viz'. Did you mean 'text4vis'?"),
        (["train.batch_size=10"], "10 is no multiple of train.micro_batch_size 2 x 2 processes"),
        (["train.zero_stage=0"], "train.zero_stage 0 with train.precision bf16"),
        (["optim.warmup_epochs=6"], "optim.warmup_epochs 6 uses up all of train.epochs 6"),
        (["train.deepspeed=absent.json"], "train.deepspeed: no such file: absent.json"),
    ],
)
def test_mistakes_end_with_one_line_before_anything_is_written(
    tmp_path: Path,
    recipe: list[str],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    sets = [word for pair in words for word in ("--set", pair)]
    assert main([*recipe, *sets, "--num-processes", "2"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_the_launchers_own_option_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=0", "train"]) == 2
    assert capsys.readouterr().err == "error: --config is not set: training needs a configuration\n"


def test_processes_start_beside_a_folder_that_is_named_like_the_package(tmp_path: Path) -> None:
    """As it is in the parent of a clone, for an editable installation."""
    (tmp_path / "kineticlip").mkdir()
    code = "import sys, kineticlip.runtime; sys.stdout.write(kineticlip.runtime.__name__)"
    (tmp_path / "started.py").write_text(code)
    parent = (
        "import subprocess, sys; from kineticlip.runtime.launch import child_environment; "
        "subprocess.run([sys.executable, '-m', 'started'], check=True, env=child_environment())"
    )
    where = {**os.environ, "PYTHONPATH": ""}
    words = [sys.executable, "-I", "-c", parent]
    ran = subprocess.run(words, cwd=tmp_path, env=where, capture_output=True, text=True, check=True)
    assert ran.stdout == "kineticlip.runtime"


def test_the_launcher_is_told_the_gpus_that_are_visible() -> None:
    """It drops CUDA_VISIBLE_DEVICES where it is given a number, and trains on the first ones."""
    assert device_words(2, gpus=2, visible="4,5") == ["--include", "localhost:4,5"]
    assert device_words(2, gpus=3, visible="7, 1,0") == ["--include", "localhost:7,1"]
    assert device_words(2, gpus=8, visible="") == ["--num_gpus", "2"]
    assert device_words(2, gpus=0, visible="4") == ["--num_gpus", "2"]  # on a CPU it means nothing
    with pytest.raises(UserError, match=r"3: only 2 GPUs are visible \(CUDA_VISIBLE_DEVICES=4,5\)"):
        device_words(3, gpus=2, visible="4,5")
    with pytest.raises(UserError, match=r"takes numbers of GPUs, not their identifiers"):
        device_words(1, gpus=1, visible="GPU-3f2c1ab0")


def test_deepspeed_starts_the_ranks_on_those_gpus() -> None:
    """Its own reading of the words, on a machine of eight."""
    from deepspeed.launcher.runner import parse_args, parse_inclusion_exclusion

    words = device_words(2, gpus=2, visible="4,5")
    args = parse_args([*words, "train.py"])
    pool = parse_inclusion_exclusion({"localhost": 8}, args.include, args.exclude)
    assert list(pool.items()) == [("localhost", [4, 5])]
