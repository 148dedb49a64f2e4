"""The mean of a run's weights over its epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.formats.trained import load_weights
from kineticlip.runtime.errors import UserError
from kineticlip.training.average import WeightAverage
from kineticlip.training.job import Job
from kineticlip.training.loop import train
from toy_training import ALONE, TOY, Toy, ToyLoader, toy_config


def run(
    config: Config, device: torch.device, states: list[dict[str, Tensor]], *, killed_at: int = 0
) -> None:
    """Trains, and notes the weights at the end of every epoch; a step may be the last."""

    def note(model: nn.Module, step: int) -> dict[str, Any]:
        if step == killed_at:
            raise KeyboardInterrupt
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {}

    loader = ToyLoader(16, config.train.micro_batch_size, ALONE)
    train(
        Job(
            config=config,
            method=TOY,
            model=Toy(),
            loader=loader,
            ranks=ALONE,
            device=device,
            validate=note,
        )
    )


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (1, "bf16")])
def test_the_mean_is_over_the_last_epochs(
    tmp_path: Path,
    device: torch.device,
    stage: int,
    precision: str,
) -> None:
    """And an interrupted run's is the same to the bit: no epoch missing, none twice."""
    whole, broken = (
        toy_config(
            tmp_path / name, epochs=4, average_from=2, zero_stage=stage, precision=precision,
            checkpoint_every=5,
        )
        for name in ("whole", "broken")
    )  # fmt: skip
    states: list[dict[str, Tensor]] = []
    run(whole, device, states)
    assert len(states) == 4
    found = load_weights(tmp_path / "whole" / "averaged.safetensors").tensors
    last = load_weights(tmp_path / "whole" / "weights.safetensors").tensors
    near = 1e-6 if precision == "fp32" else 1e-2  # there the model itself holds rounded ones
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        mean = torch.stack([state[name].float() for state in states[1:]]).mean(dim=0)
        torch.testing.assert_close(tensor, mean, atol=near, rtol=0, msg=name)
    assert (found["head.weight"] - last["head.weight"]).abs().max() > 1e-3
    with pytest.raises(KeyboardInterrupt):  # the third epoch's mean is in no checkpoint yet
        run(broken, device, [], killed_at=12)
    run(broken, device, [])
    again = load_weights(tmp_path / "broken" / "averaged.safetensors").tensors
    for name, tensor in found.items():
        assert torch.equal(again[name], tensor), name


def test_whole_numbers_are_not_averaged() -> None:
    average = WeightAverage()
    for value in (1, 4):
        average.add({"count": torch.tensor(value), "half": torch.tensor(value).half()})
    assert average.mean["count"] == 4
    assert average.mean["half"].dtype == torch.float32 and average.mean["half"] == 2.5


def test_without_the_setting_there_is_no_such_file(tmp_path: Path, device: torch.device) -> None:
    run(toy_config(tmp_path), device, [])
    assert (tmp_path / "weights.safetensors").exists()
    assert not (tmp_path / "averaged.safetensors").exists()
    assert not list(tmp_path.rglob("average.pt"))
    with pytest.raises(UserError, match=r"train.average_from should not be negative"):
        run(toy_config(tmp_path, average_from=-1), device, [])
