"""Weights on 16-byte addresses: the layout that ZeRO is given, and checkpoints of the old one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kineticlip.formats.trained import load_weights
from kineticlip.runtime.distributed import free_port
from kineticlip.training import loop
from kineticlip.training.checkpoint import committed, read_manifest
from kineticlip.training.engine import aligned_groups, start
from kineticlip.training.job import Job

PROGRAM = Path(__file__).parents[1] / "aligned_ranks.py"


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size)) for size in sizes]


def sizes(groups: list[dict[str, Any]]) -> list[list[int]]:
    return [[p.numel() for p in group["params"]] for group in groups]


def test_one_odd_tensor_ends_a_group_and_the_others_stand_alone() -> None:
    groups = [
        {"params": parameters(1, 16, 5, 8, 3), "lr": 0.1, "name": "clip"},
        {"params": parameters(24, 32), "lr": 0.2, "name": "new"},
    ]
    below, shown = aligned_groups(groups, stage=2)
    assert sizes(below) == [[16, 8, 1], [24, 32], [5], [3]]
    assert [group["lr"] for group in below] == [0.1, 0.2, 0.1, 0.1] and shown == [0, 1]
    third, shown = aligned_groups(groups, stage=3)
    assert sizes(third) == [[16, 8], [24, 32], [5], [3], [1]] and shown == [0, 1]
    assert {key for group in third for key in group} == {"params", "lr", "name"}


def test_a_group_of_odd_tensors_alone_keeps_its_rate() -> None:
    groups = [{"params": parameters(1), "lr": 0.1}, {"params": parameters(8), "lr": 0.2}]
    third, shown = aligned_groups(groups, stage=3)
    assert sizes(third) == [[8], [1]]
    assert [third[place]["lr"] for place in shown] == [0.1, 0.2]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_trained_tensor_of_every_method_is_aligned(stage: int, ranks: int) -> None:
    # Two ranks start an engine in 3 s on one core: one method stands for those with an odd tensor.
    methods = ["actionclip", "vitaclip"] if ranks == 2 else []
    program = [str(PROGRAM), str(stage), *methods]
    words = [
        sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "2",
        "--master_port", str(free_port()), "--no_local_rank", *program,
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        words if ranks == 2 else [sys.executable, *program],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    *bad, last = ran.stdout.strip().splitlines()
    assert bad == []
    looked_at = int(last.split()[0])
    assert looked_at > (200 if ranks == 2 else 700), last


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_in_the_layout_of_before_goes_on_in_it(
    tmp_path: Path, device: torch.device, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toy_training import ALONE, TOY, Toy, ToyLoader, toy_config

    def run(name: str, *, killed_at: int = 0) -> Path:
        def die(model: nn.Module, step: int) -> dict[str, Any]:
            if step == killed_at:
                raise KeyboardInterrupt
            return {}

        config = toy_config(tmp_path / name, zero_stage=stage, precision="bf16", checkpoint_every=2)
        job = Job(
            config=config, method=TOY, model=Toy(), loader=ToyLoader(16, 2, ALONE),
            ranks=ALONE, device=device, validate=die,
        )  # fmt: skip
        return loop.train(job).weights

    new = load_weights(run("new")).tensors
    with monkeypatch.context() as patch:
        patch.setattr(loop, "start", lambda job, *, aligned: start(job, aligned=False))
        old = load_weights(run("old")).tensors
        with pytest.raises(KeyboardInterrupt):
            run("broken", killed_at=4)
    assert read_manifest(committed(tmp_path / "broken" / "checkpoints")[-1]).format == 1
    again = load_weights(run("broken")).tensors
    assert read_manifest(committed(tmp_path / "broken" / "checkpoints")[-1]).format == 1
    assert read_manifest(committed(tmp_path / "new" / "checkpoints")[-1]).format == 2
    for name, tensor in old.items():
        assert torch.equal(again[name], tensor), name
        assert torch.equal(new[name], tensor), name  # the order of the tensors changes no bit
