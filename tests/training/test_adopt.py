"""Going on with official EVL and Vita-CLIP runs, their optimiser included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kineticlip.formats import read_optimiser
from kineticlip.formats.trained import load_weights
from kineticlip.runtime.distributed import Ranks, free_port
from kineticlip.runtime.errors import UserError
from kineticlip.training.steps import TrainingRun
from official_run import STOP, go_on, plain_run
from toy_training import rows

PROGRAM = Path(__file__).parents[1] / "official_run.py"
Run = tuple[Path, dict[str, Tensor], list[float]]
METHODS = ("evl", "vitaclip")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {name: plain_run(name, tmp_path_factory.mktemp(name)) for name in METHODS}


def compare(output: Path, expected: Run) -> None:
    """Losses of the steps behind the file, and the last weights."""
    _, weights, losses = expected
    found = rows(output)
    assert [row["step"] for row in found] == [3, 4, 5]
    assert [row["loss"] for row in found] == pytest.approx(losses[STOP:], abs=2e-6)
    ours = load_weights(output / "weights.safetensors").tensors
    assert ours.keys() == weights.keys()
    for name, tensor in weights.items():
        # Softmax drops this bias; AdamW turns the noise of its gradient into steps.
        loose = 1e-3 if name.endswith(("k_proj.bias", "attn_layer.in_proj_bias")) else 5e-6
        torch.testing.assert_close(ours[name], tensor, atol=loose, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_an_official_run_goes_on_as_if_never_stopped(
    tmp_path: Path, device: torch.device, runs: dict[str, Run], method: str, stage: int
) -> None:
    file = runs[method][0]
    option = f"train.zero_stage={stage}"
    go_on(method, file, tmp_path, option, ranks=Ranks(), device=device)
    compare(tmp_path, runs[method])


def test_the_optimiser_is_what_makes_the_difference(
    tmp_path: Path, device: torch.device, runs: dict[str, Run]
) -> None:
    """The same file with its moments set to zero: other weights, so the tests above can fail."""
    tree = torch.load(runs["evl"][0], weights_only=True)
    for state in tree["optimizer"]["state"].values():
        state["exp_avg"].zero_()
    torch.save(tree, tmp_path / "zeros.pth")
    go_on("evl", tmp_path / "zeros.pth", tmp_path / "run", ranks=Ranks(), device=device)
    ours = load_weights(tmp_path / "run" / "weights.safetensors").tensors
    name = "decoder.decoder_layers.0.mlp.fc1.weight"
    assert (ours[name] - runs["evl"][1][name]).abs().max() > 5e-5


def test_two_ranks_share_an_official_optimiser(tmp_path: Path, runs: dict[str, Run]) -> None:
    plan = [
        {"method": name, "start": str(runs[name][0]), "stage": stage,
         "output": str(tmp_path / f"{name}{stage}")}
        for name in METHODS
        for stage in (0, 1)
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "2",
        "--master_port", str(free_port()), "--no_local_rank", str(PROGRAM),
        json.dumps({"runs": plan}),
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    for run in plan:
        compare(Path(str(run["output"])), runs[str(run["method"])])


def test_the_same_command_goes_on_from_the_runs_own_checkpoint(
    tmp_path: Path,
    device: torch.device,
    runs: dict[str, Run],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(model: Any, step: int) -> dict[str, Any]:
        raise KeyboardInterrupt

    options = ("train.checkpoint_every=1", "train.eval_every=0")
    here: dict[str, Any] = {"ranks": Ranks(), "device": device}
    with pytest.raises(KeyboardInterrupt):  # after the last step, not saved yet
        go_on("evl", runs["evl"][0], tmp_path, *options, **here, validate=interrupt)
    assert f"resuming after step 2, from {runs['evl'][0]}" in capsys.readouterr().err
    go_on("evl", runs["evl"][0], tmp_path, *options, ranks=Ranks(), device=device)
    assert "resuming after step 4, from " in capsys.readouterr().err
    compare(tmp_path, runs["evl"])


def changed(path: Path, to: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    tree = torch.load(path, weights_only=True)
    change(tree)
    torch.save(tree, to)
    return to


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "weights alone": (lambda t: t.pop("optimizer"), "holds no optimiser to go on with"),
    "two groups": (
        lambda t: t["optimizer"].update(param_groups=t["optimizer"]["param_groups"] * 2),
        r"in groups of \d+ \+ \d+, the official code one group with all",
    ),
    "a missing moment": (
        lambda t: t["optimizer"]["state"][0].pop("exp_avg"),
        r"'decoder.cls_token': its exp_avg is missing, the tensor \(128,\)",
    ),
    "no state for one": (
        lambda t: t["optimizer"]["state"].pop(0),
        "'decoder.cls_token' did not train there",
    ),
    "different steps": (
        lambda t: t["optimizer"]["state"][0].update(step=1),
        r"different numbers of steps: \[1, 2\]",
    ),
    "a finished run": (
        lambda t: t.update(next_step=9),
        r"stands at step 9, and this run has 5 \(train.steps",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_taken_over_is_said_in_one_line(
    tmp_path: Path, device: torch.device, runs: dict[str, Run], case: str
) -> None:
    change, message = BROKEN[case]
    file = changed(runs["evl"][0], tmp_path / "broken.pth", change)
    with pytest.raises(UserError, match=message) as error:
        go_on("evl", file, tmp_path / "run", ranks=Ranks(), device=device)
    assert "\n" not in str(error.value)


def test_parameters_frozen_there_or_here_are_named(
    tmp_path: Path, device: torch.device, runs: dict[str, Run]
) -> None:
    file = runs["vitaclip"][0]
    with pytest.raises(UserError, match=r"cls_proj.weight' did not train there, nor 7 others"):
        go_on("vitaclip", file, tmp_path, "vitaclip.train_cls_proj=true", ranks=Ranks(),
              device=device)  # fmt: skip
    stage = "train.zero_stage=3"
    with pytest.raises(UserError, match=r"goes on at train.zero_stage 0 to 2"):
        go_on("vitaclip", file, tmp_path / "3", stage, ranks=Ranks(), device=device)


def test_other_settings_hold_and_are_said(
    tmp_path: Path, device: torch.device, runs: dict[str, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    go_on("evl", runs["evl"][0], tmp_path, "optim.lr=1e-3", ranks=Ranks(), device=device)
    notes = capsys.readouterr().err
    assert "optim.lr was 0.0004 there; this run goes on with 0.001" in notes
    assert "train.steps was" not in notes
    assert rows(tmp_path)[0]["lr"] == pytest.approx([1e-3 * (1 + 0.309017) / 2], rel=1e-5)


def test_an_old_file_counts_steps_in_plain_numbers(tmp_path: Path, runs: dict[str, Run]) -> None:
    """torch before 1.12 saved them so."""

    def plain(tree: dict[str, Any]) -> None:
        for state in tree["optimizer"]["state"].values():
            state["step"] = int(state["step"])

    state = read_optimiser(changed(runs["evl"][0], tmp_path / "old.pth", plain))
    assert (state.step, state.next_step) == (STOP, STOP)
    assert state.settings["num_steps"] == 5 and state.settings["lr"] == 4e-4


@pytest.mark.parametrize("stage", [1, 2])
def test_masters_of_a_bf16_run_take_the_moments_unrounded(
    tmp_path: Path,
    device: torch.device,
    runs: dict[str, Run],
    stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed.utils import safe_get_full_optimizer_state

    state = read_optimiser(runs["evl"][0])
    seen: list[str] = []

    def look(run: Any) -> None:
        for name, parameter in run.engine.module.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
                found = safe_get_full_optimizer_state(parameter, moment)
                assert torch.equal(found, state.moments[moment][name]), (name, moment)
                seen.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "to_the_end", look)
    options = (f"train.zero_stage={stage}", "train.precision=bf16")
    with pytest.raises(KeyboardInterrupt):
        go_on("evl", runs["evl"][0], tmp_path, *options, ranks=Ranks(), device=device)
    assert len(seen) == 2 * len(state.moments["exp_avg"]) > 60
