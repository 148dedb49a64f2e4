"""The official training: its learning rates, its first gradient, its losses step by step."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kineticlip.commands.parity.apart import run_apart
from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.commands.parity.text4vis.files import LOSSES, Golden, ratios
from kineticlip.commands.parity.text4vis.models import build_case
from kineticlip.config import Config, OptimConfig, TrainConfig
from kineticlip.data.batch import Batch
from kineticlip.methods.text4vis import METHOD, VideoCLIP
from kineticlip.models.temporal import TokenConv
from kineticlip.runtime.distributed import Ranks, initialise
from kineticlip.training.job import Job
from kineticlip.training.loop import train
from kineticlip.training.optim import Timetable, rate_factor

TRAJECTORY = 1e-4  # of the losses of a run
RATES = 1e-9  # relative
NORMS = 3e-4  # relative, of weights after a run

# kind of train_loop.json -> header, and the model case with its temporal module
KINDS: dict[str, tuple[Any, str]] = {
    "Transf": ("transformer", "vit_plain"),
    "None": ("mean", "vit_plain"),
    "tokent1d": ("mean", "vit_tokent1d"),
}


def schedule_of(solver: dict[str, Any], epochs: int, warmup: float) -> dict[str, Any]:
    """The schedule options of an official solver; a number means "every so many epochs"."""
    steps = solver.get("lr_decay_step", ())
    if isinstance(steps, int):
        steps = range(steps, epochs + 1, steps)
    return {"schedule": solver["type"], "milestones": tuple(steps), "warmup_epochs": warmup}


def rate_checks(golden: Golden) -> Iterator[Check]:
    """The learning rates of both groups at every iteration."""
    recorded = golden.arrays("lr_schedule")
    for name, run in golden.json("misc_log")["lr_runs"].items():
        epochs = run["epochs"]
        options = OptimConfig(
            lr=run["lr"],
            clip_ratio=run["clip_ratio"],
            **schedule_of(run, epochs, run["warmup_epochs"]),
        )
        table = Timetable(
            epoch_length=run["iters_per_epoch"], accumulation=1, epochs=epochs, official=True
        )
        factors = [
            rate_factor(table.rate_epoch(position), options, epochs=epochs)
            for position in range(table.length)
        ]
        rates = np.outer(factors, [options.lr * options.clip_ratio, options.lr])
        expected = recorded[name]
        yield exactly(f"rates/{name}/iterations", len(rates), len(expected))
        found = ratios(rates[: len(expected)], expected[: len(rates)])
        yield compare(f"rates/{name}", found, np.ones_like(found), atol=RATES)


class RecordingEnds(Exception):
    """The recorded batches are used up; the schedule would go on."""


class RecordedLoader:
    """The recorded batches: uint8 frames, each recorded pixel enlarged to a block."""

    def __init__(self, golden: Golden) -> None:
        data, loop = golden.arrays("train_loop_data"), golden.json("train_loop")
        small = torch.from_numpy(data["frames_small_u8"])  # [batches, B, T * 3, k, k]
        repeat = loop["block_repeat"]
        pixels = small.repeat_interleave(repeat, -2).repeat_interleave(repeat, -1)
        self.pixels = pixels.unflatten(2, (loop["T"], 3))
        self.labels = torch.from_numpy(data["labels"]).long()
        self.length, self.epochs = int(loop["iters_per_epoch"]), int(loop["epochs_run"])

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        if epoch >= self.epochs:
            raise RecordingEnds
        for index in range(start, self.length):
            labels = self.labels[index]
            yield Batch(pixels=self.pixels[index], labels=labels, names=("",) * len(labels))


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """What a run leaves: the loss of every batch, its rows of metrics.jsonl, its parameters."""

    losses: list[float]
    rows: list[dict[str, Any]]
    norms: dict[str, float]
    logit_scale: float


def loop_checks(golden: Golden) -> Iterator[Check]:
    """Every recorded run through the engine's own loop, in its official update mode."""
    recorded = golden.json("train_loop")
    kinds = [kind for kind in KINDS if kind in recorded]
    (runs,) = run_apart(run_loops, [(golden.folder, kinds)], "train_loop")
    for kind, run in zip(kinds, runs, strict=True):
        yield from _group_checks(kind, recorded[kind], _initial_model(golden, kind))
        yield from _run_checks(kind, recorded, run)
    for key, expected in recorded.items():
        if key.startswith("grad_batch0_"):
            model = _initial_model(golden, key.removeprefix("grad_batch0_"))
            yield from _gradient_checks(golden, key, expected, model)


def _initial_model(golden: Golden, kind: str) -> VideoCLIP:
    """The model at the start of a run; a temporal convolution begins as its shift."""
    header, case = KINDS[kind]
    model = build_case(golden, case, header=header)
    for module in model.modules():
        if isinstance(module, TokenConv):
            module.reset_parameters()
    return model.train()


def run_loops(folder: Path, kinds: list[str]) -> list[RecordedRun]:
    """Trains every kind until the recorded batches end. DeepSpeed keeps its process groups for
    good: run this in a process of its own."""
    golden, device = Golden(folder), initialise(Ranks())
    return [_run_loop(golden, kind, device) for kind in kinds]


def _run_loop(golden: Golden, kind: str, device: torch.device) -> RecordedRun:
    loader, losses = RecordedLoader(golden), list[float]()
    model = _initial_model(golden, kind)

    def loss(engine: Callable[..., Any], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = METHOD.loss(engine, batch)
        losses.append(value.item())
        return value, metrics

    with tempfile.TemporaryDirectory() as folder:
        solver = golden.json("train_loop")["solver"]
        config = _loop_config(solver, loader.labels.shape[1], folder)
        with contextlib.suppress(RecordingEnds), contextlib.redirect_stderr(io.StringIO()):
            job = Job(
                config=config,
                method=replace(METHOD, loss=loss),
                model=model,
                loader=loader,
                ranks=Ranks(),
                device=device,
            )
            train(job)
        text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return RecordedRun(
        losses=losses,
        rows=[row for row in rows if row.get("kind") == "train"],
        norms={
            name: parameter.detach().double().norm().item()
            for name, parameter in model.named_parameters()
        },
        logit_scale=model.logit_scale.item(),
    )


def _loop_config(solver: dict[str, Any], size: int, folder: str) -> Config:
    epochs = solver["epochs"]
    return Config(
        output=folder,
        optim=OptimConfig(
            lr=solver["lr"],
            clip_ratio=solver["clip_ratio"],
            weight_decay=solver["weight_decay"],
            official_updates=True,
            **schedule_of(solver, epochs, solver["lr_warmup_step"]),
        ),
        train=TrainConfig(
            epochs=epochs,
            batch_size=size * solver["grad_accumulation_steps"],
            micro_batch_size=size,
            precision="fp32",
            zero_stage=0,
            checkpoint_every=1_000_000,
            log_every=1,
        ),
    )


def _group_checks(kind: str, expected: dict[str, Any], model: VideoCLIP) -> Iterator[Check]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group["params"] for group in METHOD.param_groups(model, Config())}
    for official, ours in (("group0", "clip"), ("group1", "new")):
        found = [names[id(parameter)] for parameter in groups.get(ours, [])]
        yield exactly(f"train/{kind}/{official}", sorted(found), sorted(expected[official]))


def _run_checks(kind: str, recorded: dict[str, Any], run: RecordedRun) -> Iterator[Check]:
    expected, rows = recorded[kind], run.rows
    yield compare(f"train/{kind}/losses", run.losses, expected["loss_per_iter"], atol=TRAJECTORY)
    iterations = [round(row["epoch"] * recorded["iters_per_epoch"]) for row in rows]
    steps = expected["optimizer_steps_iter_and_lrs"]
    yield exactly(f"train/{kind}/steps", iterations, [step[0] for step in steps])
    wide = max((len(row["lr"]) for row in rows), default=0)  # an empty group has no rate
    rates = ratios([row["lr"] for row in rows], [step[1 : 1 + wide] for step in steps])
    yield compare(f"train/{kind}/rates", rates, np.ones_like(rates), atol=RATES)
    yield exactly(f"train/{kind}/names", sorted(run.norms), sorted(expected["final"]))
    norms = [run.norms.get(name, float("nan")) for name in expected["final"]]
    found = ratios(norms, [norm for norm, *_ in expected["final"].values()])
    yield compare(f"train/{kind}/weights", found, np.ones_like(found), atol=NORMS)
    scale = ratios(run.logit_scale, expected["logit_scale"])
    yield compare(f"train/{kind}/logit_scale", scale, np.ones_like(scale), atol=NORMS)


def _gradient_checks(
    golden: Golden, key: str, expected: dict[str, Any], model: VideoCLIP
) -> Iterator[Check]:
    loss, _ = METHOD.loss(model, next(RecordedLoader(golden).epoch(0)))
    loss.backward()
    yield compare(f"train/{key}/loss", loss, expected["loss"], atol=LOSSES)
    norms = {
        name: 0.0 if parameter.grad is None else parameter.grad.double().norm().item()
        for name, parameter in model.named_parameters()
    }
    official = expected["grad_norm"]
    yield exactly(f"train/{key}/names", sorted(norms), sorted(official))
    found = [norms.get(name, float("nan")) for name in official]
    yield compare(f"train/{key}/norms", found, list(official.values()), atol=NORMS, relative=True)
