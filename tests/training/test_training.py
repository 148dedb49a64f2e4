"""The training loop: steps, metrics, skipped steps, validation, precision, and the official run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from kineticlip.config import Config, OptimConfig, Text4VisConfig, TrainConfig, load_config
from kineticlip.data.batch import Batch
from kineticlip.formats.trained import load_weights
from kineticlip.methods import METHODS
from kineticlip.methods.text4vis import VideoCLIP
from kineticlip.models.classifier import Classifier
from kineticlip.models.temporal import TEMPORAL_MODULES, TemporalTransformer
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.errors import UserError
from kineticlip.training.job import Job, Outcome
from kineticlip.training.loop import train
from text4vis_golden import ARCHITECTURE, GOLDEN, VISION, arrays, tensors
from toy_training import ALONE, CLASSES, TOY, Toy, ToyLoader, plain_torch, rows, toy_config

NAMES = tuple(f"class {index}" for index in range(CLASSES))


def run(config: Config, device: torch.device, **options: Any) -> Outcome:
    settings: dict[str, Any] = {
        "method": TOY,
        "model": Toy(0.0),
        "loader": ToyLoader(16, config.train.micro_batch_size, ALONE),
        "class_names": NAMES,
        "classifier": {"source": "text"},
    }
    resume = options.pop("resume", "auto")
    job = Job(config=config, ranks=ALONE, device=device, **{**settings, **options})
    return train(job, resume=resume)


@pytest.mark.parametrize(("stage", "clipping"), [(0, 0.0), (0, 0.3), (1, 0.3), (2, 0.0), (3, 0.3)])
def test_every_stage_trains_as_plain_torch(
    tmp_path: Path, device: torch.device, stage: int, clipping: float
) -> None:
    config = toy_config(tmp_path / "run", zero_stage=stage, gradient_clipping=clipping)
    linear = nn.functional.linear
    outcome = run(config, device)
    assert nn.functional.linear is linear  # stage 3 replaces it while it trains
    losses, model = plain_torch(config)
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, 9)) and outcome.step == 8
    assert [row["epoch"] for row in found] == [0.25 * step for step in range(1, 9)]
    assert [row["loss"] for row in found] == pytest.approx(losses, abs=2e-6)
    assert all(0 < row["grad_norm"] < 10 and row["skipped_steps"] == 0 for row in found)
    assert found[0]["lr"] == pytest.approx([0.01 / 4, 0.02 / 4])  # half of a two-step warm-up
    trained = load_weights(outcome.weights)
    assert (trained.class_names, trained.step) == (NAMES, 8)
    assert trained.classifier == {"source": "text"}
    assert trained.config["train"]["zero_stage"] == stage
    state = model.state_dict()
    assert trained.tensors.keys() == state.keys()
    for name, tensor in trained.tensors.items():
        torch.testing.assert_close(tensor, state[name], atol=2e-6, rtol=0, msg=name)
    assert torch.equal(trained.tensors["frozen.weight"], Toy().frozen.weight)


class Stop(Exception):
    """Ends a run where a test wants it to."""


class StoppingLoader(ToyLoader):
    """Raises Stop before a micro-batch, counted from the start of the run."""

    def __init__(self, at: int, batch: int = 2) -> None:
        super().__init__(16, batch, ALONE)
        self.at = at

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index, batch in enumerate(super().epoch(epoch, start), epoch * len(self) + start):
            if index == self.at:
                raise Stop
            yield batch


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "bf16")]
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    tmp_path: Path,
    device: torch.device,
    stage: int,
    precision: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Dropout draws from the random state; step 4 is done and thrown away, as after a kill."""
    whole, broken = (
        toy_config(tmp_path / name, zero_stage=stage, precision=precision, gradient_clipping=0.5)
        for name in ("whole", "broken")
    )
    run(whole, device, model=Toy())
    with pytest.raises(Stop):
        run(broken, device, model=Toy(), loader=StoppingLoader(18))
    assert [row["step"] for row in rows(broken.output)] == [1, 2, 3, 4]
    torch.manual_seed(99)
    capsys.readouterr()
    run(broken, device, model=Toy())
    assert "toy: resuming after step 3, from " in capsys.readouterr().err
    assert rows(broken.output) == rows(whole.output)
    ours, theirs = (
        load_weights(tmp_path / name / "weights.safetensors") for name in ("broken", "whole")
    )
    assert ours.step == theirs.step == 8
    for name, tensor in theirs.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(ours.tensors[name], tensor), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32_and_keeps_fp32_masters(
    tmp_path: Path, device: torch.device, stage: int
) -> None:
    config = toy_config(tmp_path / "run", zero_stage=stage, precision="bf16")
    outcome = run(config, device)
    losses, model = plain_torch(config)
    assert [row["loss"] for row in rows(config.output)] == pytest.approx(losses, abs=2e-2)
    exported = load_weights(outcome.weights).tensors
    weight = exported["head.weight"]
    torch.testing.assert_close(weight, model.get_parameter("head.weight").data, atol=2e-2, rtol=0)
    assert not torch.equal(weight, weight.bfloat16().float())  # not a copy of rounded weights
    assert exported["table"][0] == torch.tensor(1 / 3)  # buffers are never rounded


def broken_loss(at: set[int]) -> Any:
    """The toy's loss, not a number in these calls."""
    calls = iter(range(10_000))

    def loss(model: Any, batch: Batch) -> Any:
        value, metrics = TOY.loss(model, batch)
        return (value * float("nan") if next(calls) in at else value), metrics

    return replace(TOY, loss=loss)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
)
def test_steps_that_are_not_finite_are_left_out(
    tmp_path: Path, device: torch.device, stage: int, precision: str
) -> None:
    config = toy_config(tmp_path, zero_stage=stage, precision=precision, max_skipped_steps=2)
    loader = ToyLoader(16, 2, ALONE)
    method = broken_loss({5, 13})  # of the second and fourth step
    outcome = run(config, device, method=method, loader=loader)
    found = rows(tmp_path)
    assert [row["skipped_steps"] for row in found] == [0, 1, 1, 2, 2, 2, 2, 2]
    assert [row["loss"] is None for row in found] == [False, True, False, True] + [False] * 4
    assert found[1]["grad_norm"] is None or stage  # ZeRO reports the last finite norm, or none
    assert all(
        torch.isfinite(tensor).all() for tensor in load_weights(outcome.weights).tensors.values()
    )


def test_too_many_steps_in_a_row_end_the_run(tmp_path: Path, device: torch.device) -> None:
    config = toy_config(tmp_path, max_skipped_steps=2, log_every=100)
    method = broken_loss(set(range(8, 16)))
    with pytest.raises(UserError, match=r"2 steps in a row .* \(up to step 4\); lower optim.lr"):
        run(config, device, method=method, model=Toy(), loader=ToyLoader(16, 2, ALONE))
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0, 0, 1, 2]
    assert not (tmp_path / "finished.json").exists()


@pytest.mark.parametrize("stage", [1, 3])
def test_validation_sees_the_whole_model_and_leaves_no_trace(
    tmp_path: Path, device: torch.device, stage: int
) -> None:
    seen: list[tuple[int, bool, tuple[int, ...]]] = []

    def validate(model: nn.Module, step: int) -> dict[str, float]:
        seen.append((step, model.training, tuple(model.state_dict()["head.weight"].shape)))
        torch.rand(3)  # dropout of later steps must not notice
        return {"top1": step / 10}

    plain, checked = (
        toy_config(tmp_path / name, zero_stage=stage, eval_every=every)
        for name, every in (("plain", 1.0), ("checked", 0.5))
    )
    run(plain, device, model=Toy())
    outcome = run(checked, device, model=Toy(), validate=validate)
    assert seen == [(step, False, (CLASSES, 16)) for step in (2, 4, 6, 8)]
    assert rows(checked.output) == rows(plain.output)
    assert rows(checked.output, "eval")[1] == {"kind": "eval", "step": 4, "top1": 0.4}
    assert outcome.evaluation == {"top1": 0.8}
    mark = json.loads((tmp_path / "checked" / "finished.json").read_text())
    assert mark == {"step": 8, "evaluation": {"top1": 0.8}}


def test_one_evaluation_at_the_end_where_none_is_due_before(
    tmp_path: Path, device: torch.device
) -> None:
    seen: list[int] = []
    config = toy_config(tmp_path, eval_every=0, log_every=5)

    def validate(model: nn.Module, step: int) -> dict[str, Any]:
        seen.append(step)
        return {"top1": 1.0} if len(seen) == 1 else {}

    outcome = run(config, device, validate=validate)
    assert seen == [8]
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))  # none lost by log_every
    again = run(config, device, validate=validate)
    assert seen == [8]  # nothing was left to train
    assert again.evaluation == outcome.evaluation == {"top1": 1.0}


def test_a_run_records_its_config_and_machine(tmp_path: Path, device: torch.device) -> None:
    config = toy_config(tmp_path / "run", epochs=0.25, optim={"warmup_epochs": 0})
    run(config, device)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert environment["software"]["deepspeed"] == "0.19.8"
    assert environment["machine"]["cores"] >= 1


def test_a_folder_of_another_run_is_refused(tmp_path: Path, device: torch.device) -> None:
    config = toy_config(tmp_path / "run", epochs=0.25, optim={"warmup_epochs": 0})
    run(config, device)
    other = replace(config, optim=replace(config.optim, lr=1.0))
    with pytest.raises(UserError, match=r"another config: optim.lr is 0.02 there and 1.0 here"):
        run(other, device)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if killed before the first of them
    with pytest.raises(UserError, match=r"metrics.jsonl: belongs to another run: config.optim.lr"):
        run(other, device)
    with pytest.raises(UserError, match="already holds a run; choose another output folder"):
        run(config, device, resume="never")
    assert len(rows(config.output)) == 1


def test_a_changed_training_list_is_refused(tmp_path: Path, device: torch.device) -> None:
    config = toy_config(tmp_path)
    with pytest.raises(Stop):
        run(config, device, loader=StoppingLoader(13))
    with pytest.raises(UserError, match="16 micro-batches there and has 15 now"):
        run(config, device, loader=ToyLoader(15, 2, ALONE))


GOLDEN_LOOP = json.loads((GOLDEN / "train_loop.json").read_text())
# name in the golden file -> header and temporal module
KINDS: dict[str, dict[str, Any]] = {
    "Transf": {"header": "transformer", "temporal_module": "none"},
    "tokent1d": {"header": "mean", "temporal_module": "tokent1d"},
}


def official_model(header: str, temporal_module: str) -> VideoCLIP:
    """The official model at the recorded run's start."""
    frames = GOLDEN_LOOP["T"]
    plain = temporal_module == "none"
    shifts = None if plain else partial(TEMPORAL_MODULES[temporal_module], frames=frames)
    assert ARCHITECTURE.text is not None
    model = VideoCLIP(
        VisionTransformer(VISION, control_point=shifts),
        TemporalTransformer(VISION.embed, ARCHITECTURE.text.width // 64)
        if header == "transformer"
        else None,
        embed=VISION.embed,
        per_clip=not plain,
    )
    state = tensors("clip_vit_base") | (tensors("fusion_transf") if header != "mean" else {})
    wanted = model.state_dict()
    missing = model.load_state_dict({k: v for k, v in state.items() if k in wanted}, strict=False)
    assert all("control_point" in name for name in missing.missing_keys)
    text = tensors("case_text")["text_features"]
    model.set_classifier(Classifier(text, tuple(str(index) for index in range(len(text)))))
    return model


class OfficialLoader:
    """The recorded batches: uint8 frames, each recorded pixel enlarged to a block."""

    def __init__(self, epochs: int) -> None:
        data = arrays("train_loop_data")
        repeat, frames = GOLDEN_LOOP["block_repeat"], GOLDEN_LOOP["T"]
        small = torch.from_numpy(data["frames_small_u8"])  # [batches, 2, T * 3, k, k]
        pixels = small.repeat_interleave(repeat, -2).repeat_interleave(repeat, -1)
        self.pixels = pixels.unflatten(2, (frames, 3))
        self.labels = torch.from_numpy(data["labels"]).long()
        self.epochs = epochs

    def __len__(self) -> int:
        return int(GOLDEN_LOOP["iters_per_epoch"])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if epoch == self.epochs:
            raise Stop
        for index in range(start, len(self)):
            yield Batch(pixels=self.pixels[index], labels=self.labels[index], names=("", ""))


@pytest.mark.parametrize(("kind", "stage"), [("Transf", 0), ("Transf", 1), ("tokent1d", 2)])
def test_the_official_training_run(
    tmp_path: Path, device: torch.device, kind: str, stage: Literal[0, 1, 2]
) -> None:
    """24 iterations of the official train.py in its own update mode, of a schedule for 48."""
    solver, golden = GOLDEN_LOOP["solver"], GOLDEN_LOOP[kind]
    config = Config(
        output=str(tmp_path),
        text4vis=Text4VisConfig(**KINDS[kind]),
        optim=OptimConfig(
            lr=solver["lr"],
            clip_ratio=solver["clip_ratio"],
            weight_decay=solver["weight_decay"],
            warmup_epochs=solver["lr_warmup_step"],
            official_updates=True,
        ),
        train=TrainConfig(
            epochs=solver["epochs"],
            batch_size=2 * solver["grad_accumulation_steps"],
            micro_batch_size=2,
            precision="fp32",
            zero_stage=stage,
            checkpoint_every=12,
            log_every=1,
        ),
    )
    losses: list[float] = []

    def loss(model: Any, batch: Batch) -> Any:
        value, metrics = METHODS["text4vis"].loss(model, batch)
        losses.append(value.item())
        return value, metrics

    model = official_model(**KINDS[kind])
    with pytest.raises(Stop):
        job = Job(
            config=config,
            method=replace(METHODS["text4vis"], loss=loss),
            model=model,
            loader=OfficialLoader(GOLDEN_LOOP["epochs_run"]),
            ranks=ALONE,
            device=device,
        )
        train(job)
    assert losses == pytest.approx(golden["loss_per_iter"], abs=1e-4)
    found = rows(tmp_path)
    assert [[2 * row["step"], *row["lr"]] for row in found] == [
        pytest.approx(expected[: 1 + len(row["lr"])])
        for row, expected in zip(found, golden["optimizer_steps_iter_and_lrs"], strict=True)
    ]
    pairs = zip(golden["loss_per_iter"][::2], golden["loss_per_iter"][1::2], strict=True)
    assert [row["loss"] for row in found] == pytest.approx(
        [(first + second) / 2 for first, second in pairs], abs=1e-4
    )  # the true mean; the official log divides it by the accumulation
    trained = dict(model.named_parameters())
    assert trained.keys() == golden["final"].keys()
    for name, (norm, *_) in golden["final"].items():
        assert trained[name].detach().norm().item() == pytest.approx(norm, rel=3e-4), name
    assert model.logit_scale.item() == pytest.approx(golden["logit_scale"], rel=3e-4)


def test_the_official_gradient_of_the_first_batch() -> None:
    golden = GOLDEN_LOOP["grad_batch0_Transf"]
    model = official_model("transformer", "none")
    batch = next(OfficialLoader(1).epoch(0))
    loss, _ = METHODS["text4vis"].loss(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-5)
    norms = {
        name: parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert norms == pytest.approx(golden["grad_norm"], rel=3e-4, abs=1e-6)


def test_monitors_get_every_number(tmp_path: Path, device: torch.device) -> None:
    """DeepSpeed's own monitors know neither the loss nor the step."""
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"}}
    (tmp_path / "ds.json").write_text(json.dumps(monitor))
    config = toy_config(tmp_path / "run", deepspeed=str(tmp_path / "ds.json"))
    run(config, device, validate=lambda model, step: {"top1": 0.5})
    lines = (tmp_path / "csv" / "train_loss.csv").read_text().split()[1:]
    losses = [float(line.split(",")[1]) for line in lines]
    assert losses == pytest.approx([row["loss"] for row in rows(config.output)])
    assert (tmp_path / "csv" / "eval_top1.csv").exists()
