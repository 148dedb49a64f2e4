"""The training loop: one for every method, every ZeRO stage, one process or many, CPU or GPU.

The loop knows a method only as `loss(model, batch)` and its parameter groups. It owns
accumulation, the schedule, skipped steps, metrics, validation and checkpoints; a run that is
killed at any moment goes on from its last checkpoint with the same losses to the bit.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kineticlip.config import Config
from kineticlip.runtime.distributed import Ranks, barrier
from kineticlip.runtime.errors import UserError
from kineticlip.training import checkpoint as checkpoints
from kineticlip.training.adopt import adopt, official_state
from kineticlip.training.average import WeightAverage
from kineticlip.training.checkpoint import Progress
from kineticlip.training.deepspeed_config import accumulation_steps, linear_restored
from kineticlip.training.engine import start
from kineticlip.training.job import (
    WEIGHTS,
    Job,
    Outcome,
    check_settings,
)
from kineticlip.training.log import METRICS, last_evaluation, open_run
from kineticlip.training.optim import Timetable, epochs_of
from kineticlip.training.steps import TrainingRun


@linear_restored()
def train(job: Job, *, resume: str = "auto", official: str = "") -> Outcome:
    """Trains the job's model in place from its weights, or from where a checkpoint of it stands.

    Everything goes to config.output_dir: config.yaml, environment.json, metrics.jsonl,
    checkpoints/, weights.safetensors and, last, finished.json. official: a checkpoint of an
    official code whose optimiser a run without checkpoints goes on with (see adopt). Raises
    UserError for settings that cannot work, a checkpoint that is damaged or another run's (before
    the folder is touched), and after train.max_skipped_steps non-finite steps in a row.
    """
    config, ranks = job.config, job.ranks
    check_settings(config, world_size=ranks.world_size, cuda=job.device.type == "cuda")
    table = timetable(config, len(job.loader), world_size=ranks.world_size)
    found = checkpoints.find_resumable(resume, config.output_dir, config, ranks)
    started = start(job, aligned=found is None or checkpoints.is_aligned(found))
    _seed(config.seed + ranks.rank)
    average = WeightAverage()
    progress = Progress(epoch_length=len(job.loader))
    if found is not None:
        average.load(found)
        progress = _position_of(found, started.engine, job)
    elif official:
        state = official_state(official, config, ranks)
        progress = adopt(state, started.engine, config, table)
    _say_where_it_begins(config, ranks, progress, found or official)
    journal = open_run(config, progress, ranks) if ranks.is_first else None
    run = TrainingRun(
        job=job,
        started=started,
        table=table,
        journal=journal,
        progress=progress,
        evaluation=last_evaluation(journal) if journal is not None else {},
        average=average,
    )
    try:
        run.to_the_end()
        run.export()
        barrier()
    finally:
        run.close()
    return Outcome(
        step=run.progress.step,
        weights=config.output_dir / WEIGHTS,
        evaluation=run.evaluation,
    )


def timetable(config: Config, epoch_length: int, *, world_size: int) -> Timetable:
    """The steps of a run whose epochs have so many micro-batches. UserError for a warmup of all."""
    accumulation = accumulation_steps(config, world_size=world_size)
    table = Timetable(
        epoch_length=epoch_length,
        accumulation=accumulation,
        epochs=epochs_of(config.train, epoch_length=epoch_length, accumulation=accumulation),
        official=config.optim.official_updates,
        at_start=config.optim.rate_at == "start",
    )
    if config.optim.warmup_epochs >= table.epochs:
        raise UserError(
            f"optim.warmup_epochs {config.optim.warmup_epochs:g} uses up all of the "
            f"{table.epochs:g} epochs of the run"
        )
    return table


def _position_of(found: Path, engine: Any, job: Job) -> Progress:
    """Loads a checkpoint into the engine. UserError where its epochs were of another length."""
    progress = checkpoints.load(found, engine, job.ranks)
    if progress.epoch_length != len(job.loader):
        raise UserError(
            f"{found}: an epoch had {progress.epoch_length} micro-batches there and has "
            f"{len(job.loader)} now; the training list changed (data.train_list)"
        )
    return progress


def _say_where_it_begins(
    config: Config, ranks: Ranks, progress: Progress, source: Path | str
) -> None:
    if ranks.is_first and progress.step:
        print(f"{config.name}: resuming after step {progress.step}, from {source}", file=sys.stderr)
    elif ranks.is_first and (config.output_dir / METRICS).exists():
        print(
            f"{config.name}: no checkpoint yet; starting again from the beginning", file=sys.stderr
        )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
