"""AdamW over a method's groups, and when and how far it steps: pure functions of the position.

A position is a number of micro-batches (one forward of one process) since the start of the run;
nothing here has state, so a resumed run steps exactly as one that was never stopped.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kineticlip.config import OptimConfig, TrainConfig
from kineticlip.runtime.errors import UserError

GAMMA = 0.1  # the multistep schedule's factor at each milestone
OFFICIAL_INTERVAL = 10  # the official loop sets the learning rate every tenth iteration


def build_optimizer(
    groups: Sequence[dict[str, Any]], config: OptimConfig, *, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW over groups that bring their own `lr`, and `weight_decay` where it differs.

    Groups without parameters are left out (DeepSpeed cannot flatten them). Raises UserError when
    nothing is left to train.
    """
    filled = [group for group in groups if len(group["params"]) > 0]
    if not filled:
        raise UserError("every parameter is frozen: there is nothing to train")
    return torch.optim.AdamW(
        filled,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )


def rate_factor(epoch: float, config: OptimConfig, *, epochs: float) -> float:
    """The factor on every group's learning rate at a fraction of an epoch.

    Linear warm-up from 0, then one of three schedules (specification of the official
    utils/lr_scheduler.py): cosine to 0 at `epochs`, a tenth at each milestone, or constant.
    """
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "multistep":
        return float(GAMMA ** bisect_right(config.milestones, epoch))
    progress = min((epoch - config.warmup_epochs) / (epochs - config.warmup_epochs), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def epochs_of(train: TrainConfig, *, epoch_length: int, accumulation: int) -> float:
    """The length of a run in epochs, also where train.steps gives it in optimiser steps."""
    return train.steps * accumulation / epoch_length if train.steps else train.epochs


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """Which micro-batches end in an optimiser step, and at what point of the schedule.

    Clean: the stream of micro-batches runs through the epochs, every `accumulation` of them make
    a step, and the rate is that of the step's middle, so neither the first nor the last is lost;
    at_start takes that of its start, as EVL's code does, without a warm-up from 0.
    Official: steps are counted from the start of each epoch; what is left at its end is neither
    stepped nor cleared and joins the next epoch's first step; the rate is set at the first and at
    every tenth iteration of an epoch and held in between, so the run's first nine are at 0.
    """

    epoch_length: int  # micro-batches of one process
    accumulation: int
    epochs: float
    official: bool = False
    at_start: bool = False

    def __post_init__(self) -> None:
        if self.epoch_length < 1:
            raise UserError("the training list is shorter than one micro-batch of all processes")
        if self.official and self.epoch_length < self.accumulation:
            raise UserError(
                f"optim.official_updates: an epoch of {self.epoch_length} micro-batches never "
                f"reaches a step of {self.accumulation}; lower train.batch_size"
            )

    @property
    def length(self) -> int:
        """Micro-batches of the whole run; the last one ends in a step."""
        length = round(self.epochs * self.epoch_length)
        if not self.official:
            return max(round(length / self.accumulation), 1) * self.accumulation
        while length > 0 and not self.is_step(length - 1):
            length -= 1  # a remainder that no step would use
        return max(length, self.accumulation)

    @property
    def steps(self) -> int:
        return self.steps_before(self.length)

    def is_step(self, position: int) -> bool:
        """Whether the micro-batch at a position is the last one of an optimiser step."""
        within = position % self.epoch_length if self.official else position
        return (within + 1) % self.accumulation == 0

    def steps_before(self, position: int) -> int:
        """Optimiser steps that micro-batches 0 .. position - 1 end in."""
        if not self.official:
            return position // self.accumulation
        epochs, within = divmod(position, self.epoch_length)
        return epochs * (self.epoch_length // self.accumulation) + within // self.accumulation

    def position_after(self, steps: int) -> int:
        """Micro-batches up to and with the one that ended in the last of so many steps."""
        if not self.official:
            return steps * self.accumulation
        epochs, within = divmod(steps, self.epoch_length // self.accumulation)
        return epochs * self.epoch_length + within * self.accumulation

    def epoch(self, position: int) -> float:
        """Epochs done before a position."""
        return position / self.epoch_length

    def rate_epoch(self, position: int) -> float:
        """The epoch fraction that gives the learning rate in force at a position."""
        if not self.official:
            first = position - position % self.accumulation
            within = 0.0 if self.at_start else self.accumulation / 2
            return (first + within) / self.epoch_length
        epoch, within = divmod(position, self.epoch_length)
        tens = (within + 1) // OFFICIAL_INTERVAL * OFFICIAL_INTERVAL
        return epoch + max(tens - 1, 0) / self.epoch_length
