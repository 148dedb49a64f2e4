"""What a training run is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from kineticlip.config import Config
from kineticlip.data.batch import Batch
from kineticlip.methods.method import Method
from kineticlip.runtime.distributed import Ranks
from kineticlip.runtime.errors import UserError
from kineticlip.training.deepspeed_config import deepspeed_settings

WEIGHTS = "weights.safetensors"
AVERAGED = "averaged.safetensors"  # beside them, with train.average_from
FINISHED = "finished.json"  # written last: a run without it did not end, whatever its exit status

# (whole model in evaluation mode, step) -> plain numbers; every rank calls it
Validate = Callable[[nn.Module, int], Mapping[str, Any]]


class MicroBatches(Protocol):
    """The training data of this process; the same (epoch, index) is the same batch in every run."""

    def __len__(self) -> int:
        """Micro-batches in an epoch, the same number on every rank."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from index `start` on."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run of one process: a model, what it learns from, and where it runs.

    The process group is up (distributed.initialise). class_names and classifier (where the
    classifier matrix came from) travel with the weights.
    """

    config: Config
    method: Method
    model: nn.Module
    loader: MicroBatches
    ranks: Ranks
    device: torch.device
    class_names: Sequence[str] = ()
    classifier: Mapping[str, Any] = field(default_factory=dict)
    validate: Validate | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run. evaluation: what the last validation gave."""

    step: int
    weights: Path
    evaluation: Mapping[str, Any]


def check_settings(config: Config, *, world_size: int, cuda: bool) -> None:
    """UserError for settings that cannot train, before anything is written or loaded."""
    deepspeed_settings(config, world_size=world_size, cuda=cuda)
    train, optim = config.train, config.optim
    if train.epochs <= 0:
        raise UserError(f"train.epochs should be positive, got {train.epochs}")
    if train.keep_checkpoints < 1:
        raise UserError(
            f"train.keep_checkpoints should be at least 1, got {train.keep_checkpoints}"
        )
    if train.gradient_clipping < 0 or train.eval_every < 0:
        raise UserError("train.gradient_clipping and train.eval_every should not be negative")
    if train.steps < 0 or train.average_from < 0:
        raise UserError("train.steps and train.average_from should not be negative")
    if train.steps == 0 and optim.warmup_epochs >= train.epochs:
        raise UserError(
            f"optim.warmup_epochs {optim.warmup_epochs:g} uses up all of train.epochs "
            f"{train.epochs:g}"
        )
