"""EVL under its optimiser and schedule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from kineticlip.commands.parity.check import Check, compare
from kineticlip.commands.parity.evl.model import (
    FORWARD,
    NOISE,
    load_model,
    read_tensors,
)
from kineticlip.config import OptimConfig, TrainConfig
from kineticlip.data.batch import Batch
from kineticlip.methods.evl import METHOD
from kineticlip.training.optim import Timetable, build_optimizer, epochs_of, rate_factor

UPDATED = 5e-5  # parameters after AdamW, which turns rounding of small gradients into moves


def three_steps(folder: Path, clip: Tensor, labels: Tensor) -> Iterator[Check]:
    """Optimiser steps with the run's own schedule, whole batches and in two parts."""
    facts = json.loads((folder / "train3.json").read_text())
    after = read_tensors(folder / "train3.safetensors")
    optim = OptimConfig(
        lr=facts["lr"],
        weight_decay=facts["weight_decay"],
        betas=tuple(facts["betas"]),
        eps=facts["eps"],
        warmup_epochs=0.0,
        rate_at="start",
    )
    for parts in (1, 2):
        seen = facts[f"batch_split{parts}"]
        name = f"{folder.name} train3 in {parts}"
        model = load_model(folder).train()
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": optim.lr}]
        optimizer = build_optimizer(groups, optim)
        losses, rates = [], []
        for step in range(len(seen["losses"])):
            rates.append(optim.lr * factor(step, facts["T_max"], parts, optim))
            optimizer.param_groups[0]["lr"] = rates[-1]
            total = 0.0
            for pixels, targets in zip(clip.chunk(parts), labels.chunk(parts), strict=True):
                batch = Batch(pixels=pixels, labels=targets, names=("",) * len(targets))
                loss, _ = METHOD.loss(model, batch)
                (loss / parts).backward()
                total += float(loss.detach()) / parts
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        yield compare(f"{name}: losses", losses, seen["losses"], atol=FORWARD, relative=True)
        yield compare(f"{name}: rates", rates, seen["lr_used"], atol=1e-12, relative=True)
        for parameter, value in model.named_parameters():
            if f"after3.{parameter}" in after and not parameter.endswith(NOISE):
                expected = after[f"after3.{parameter}"]
                yield compare(f"{name}: {parameter}", value, expected, atol=UPDATED)


def factor(step: int, steps: int, parts: int, optim: OptimConfig) -> float:
    """The schedule's factor at an optimiser step, as the training loop takes it."""
    train = TrainConfig(steps=steps)
    table = Timetable(
        epoch_length=parts,
        accumulation=parts,
        epochs=epochs_of(train, epoch_length=parts, accumulation=parts),
        at_start=optim.rate_at == "start",
    )
    position = step * parts + parts - 1  # of the micro-batch that ends the step
    assert table.steps == steps and table.is_step(position)
    return rate_factor(table.rate_epoch(position), optim, epochs=table.epochs)


def learning_rates(folder: Path) -> Iterator[Check]:
    """The rates of a whole run."""
    facts = json.loads((folder / "lr.json").read_text())
    optim = OptimConfig(lr=facts["base_lr"], warmup_epochs=0.0, rate_at="start")
    steps = facts["T_max"]
    used = [
        optim.lr * factor(step, steps, 1, optim) for step in range(len(facts["lr_used_at_step"]))
    ]
    # The official scheduler multiplies from step to step, and rounds at every one.
    yield compare("lr: used", used, facts["lr_used_at_step"], atol=1e-12 * optim.lr * steps)
    final = optim.lr * rate_factor(float(steps), optim, epochs=float(steps))
    yield compare("lr: after the last step", final, facts["lr_final"], atol=1e-12 * optim.lr)
