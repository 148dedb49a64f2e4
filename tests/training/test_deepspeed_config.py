"""What DeepSpeed is told, and what of a user's JSON is refused instead of ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kineticlip.config import Config, TrainConfig
from kineticlip.runtime.errors import UserError
from kineticlip.training.deepspeed_config import accumulation_steps, deepspeed_settings

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))


def settings(tmp_path: Path, user: Any = None, *, cuda: bool = False, **train: Any) -> Any:
    if user is not None:
        path = tmp_path / "ds.json"
        path.write_text(user if isinstance(user, str) else json.dumps(user))
        train["deepspeed"] = str(path)
    values: dict[str, Any] = {"batch_size": 16, "micro_batch_size": 2, **train}
    config = Config(train=TrainConfig(**values))
    return deepspeed_settings(config, world_size=2, cuda=cuda)


def test_nothing_is_left_to_deepspeeds_defaults(tmp_path: Path) -> None:
    told = settings(tmp_path, zero_stage=2)
    assert told["gradient_clipping"] == 0.0  # absent would mean 1.0
    assert told["train_batch_size"] == 16
    assert told["train_micro_batch_size_per_gpu"] == 2
    assert told["gradient_accumulation_steps"] == 4
    assert told["zero_optimization"] == {"stage": 2}
    assert (told["bf16"], told["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert told["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "optimizer" not in told and "scheduler" not in told


def test_a_users_file_lies_under_the_runs_settings(tmp_path: Path) -> None:
    user = {
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "tensorboard": {"enabled": True},
        "train_batch_size": 16,
    }
    told = settings(tmp_path, user)
    assert told["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert told["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert told["tensorboard"] == {"enabled": True}
    assert told["log_level"] == "error"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_accepted(tmp_path: Path, path: Path) -> None:
    shipped = json.loads(path.read_text())
    told = settings(tmp_path, shipped, zero_stage=2)
    assert all(key in told for key in shipped)


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"zero_optimisation": {}}, r"unknown key 'zero_optimisation'. Did you mean 'zero_optimi"),
        ({"zero_optimization": {"overlap_com": True}}, r"Did you mean 'overlap_comm'\?"),
        ({"zero_optimization": {"stage": 2}}, r"stage is 2 there, 1 by train.zero_stage"),
        ({"zero_optimization": {"stage": 7}}, r"'zero_optimization.stage': "),
        ({"zero_optimization": 2}, r"'zero_optimization' should be an object, got 2"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping is 1.0 there, 0.0 by train.gradient_cl"),
        ({"train_batch_size": 32}, r"train_batch_size is 32 there, 16 by train.batch_size"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled is True there, False by train.precision"),
        ({"optimizer": {"type": "Adam"}}, r"'optimizer' is not DeepSpeed's to set here; use the"),
        ({"scheduler": {}}, r"use optim.schedule"),
        ("{", r"ds.json:1: not valid JSON"),
        ("[]", r"expected a JSON object"),
    ],
)
def test_what_deepspeed_would_ignore_or_contradict(tmp_path: Path, user: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(tmp_path, user)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_needs_stage_1(tmp_path: Path, precision: str) -> None:
    with pytest.raises(UserError, match=rf"zero_stage 0 with train.precision {precision}"):
        settings(tmp_path, cuda=True, zero_stage=0, precision=precision)
    assert settings(tmp_path, zero_stage=0, precision="fp32")["zero_optimization"] == {"stage": 0}


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        settings(tmp_path, precision="fp16")
    assert settings(tmp_path, precision="fp16", cuda=True)["fp16"] == {"enabled": True}


def test_accumulation_is_a_whole_number() -> None:
    config = Config(train=TrainConfig(batch_size=24, micro_batch_size=4))
    assert accumulation_steps(config, world_size=3) == 2
    with pytest.raises(UserError, match=r"24 is no multiple .* 4 x 5 processes; nearest: 20"):
        accumulation_steps(config, world_size=5)


def test_the_throughput_timer_waits_for_the_device_only_where_it_is_asked_to(
    tmp_path: Path,
) -> None:
    config = Config(train=TrainConfig(batch_size=8, micro_batch_size=8))
    settings = deepspeed_settings(config, world_size=1, cuda=False)
    assert settings["timers"] == {"throughput": {"enabled": False}}
    path = tmp_path / "timed.json"
    path.write_text('{"timers": {"throughput": {"enabled": true}}}')
    config = Config(train=TrainConfig(batch_size=8, micro_batch_size=8, deepspeed=str(path)))
    assert deepspeed_settings(config, world_size=1, cuda=False)["timers"]["throughput"]["enabled"]
