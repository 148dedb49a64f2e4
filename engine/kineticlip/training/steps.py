"""The steps of a training run: micro-batches, updates, rows, validation, checkpoints, weights."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kineticlip.data.batch import Batch
from kineticlip.formats.trained import export_weights
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic
from kineticlip.runtime.journal import Journal, dump_json
from kineticlip.training import checkpoint as checkpoints
from kineticlip.training.average import WeightAverage
from kineticlip.training.checkpoint import Progress
from kineticlip.training.engine import Started, update, whole
from kineticlip.training.job import (
    AVERAGED,
    FINISHED,
    WEIGHTS,
    Job,
    MicroBatches,
)
from kineticlip.training.log import StepLog
from kineticlip.training.optim import Timetable, rate_factor
from kineticlip_kernels.recompute import recomputed


def stream(loader: MicroBatches, position: int) -> Iterator[Batch]:
    """Micro-batches from a position on, epoch after epoch, without an end."""
    epoch, start = divmod(position, len(loader))
    while True:
        count = 0
        for batch in loader.epoch(epoch, start):
            count += 1
            yield batch
        assert count == len(loader) - start, "the loader's length is not what it yields"
        epoch, start = epoch + 1, 0


@dataclass(kw_only=True)
class TrainingRun:
    """The loop and what its parts share. journal: open on the first rank only."""

    job: Job
    started: Started
    table: Timetable
    journal: Journal | None
    progress: Progress
    average: WeightAverage
    evaluation: dict[str, Any] = field(default_factory=dict)
    in_a_row: int = 0  # skipped steps

    @property
    def engine(self) -> Any:
        return self.started.engine

    def to_the_end(self) -> None:
        """Optimiser steps from where the progress stands; the last one is always saved."""
        self.log = StepLog(self.job.ranks.world_size)
        self.engine.train()
        batches = stream(self.job.loader, self.progress.position)
        with self._bar() as bar:
            self.clock = time.perf_counter()
            while self.progress.position < self.table.length:
                before = self.progress
                self._step(batches)
                self._after_step(before, bar)

    def _step(self, batches: Iterator[Batch]) -> None:
        """Micro-batches up to and with the one that ends in an optimiser step."""
        position, ends = self.progress.position, False
        while not ends:
            ends = self.table.is_step(position)
            self.engine.set_gradient_accumulation_boundary(ends)
            lean = (
                recomputed()
                if self.job.config.train.recompute_outputs
                else contextlib.nullcontext()
            )
            with lean:
                loss, metrics = self.job.method.loss(
                    self.engine, _on(self.job.device, next(batches))
                )
            self.engine.backward(loss)
            self.log.add(loss, metrics)
            if not ends:
                self.engine.step()
            position += 1
        lrs = self._set_rates(position - 1)
        applied, norm = update(self.engine, self.job.config.train)
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.progress = replace(
            self.progress,
            step=self.table.steps_before(position),
            position=position,
            skipped=self.progress.skipped + (not applied),
        )
        self.log.end_step(
            {
                "kind": "train",
                "step": self.progress.step,
                "epoch": round(self.table.epoch(position), 6),
                "lr": [lrs[place] for place in self.started.shown],
                "grad_norm": norm,
                "skipped_steps": self.progress.skipped,
            }
        )

    def _lean(self) -> contextlib.AbstractContextManager[None]:
        if self.job.config.train.recompute_outputs:
            return recomputed()
        return contextlib.nullcontext()

    def _set_rates(self, position: int) -> list[float]:
        epoch = self.table.rate_epoch(position)
        factor = rate_factor(epoch, self.job.config.optim, epochs=self.table.epochs)
        lrs = [rate * factor for rate in self.started.rates]
        for group, lr in zip(self.engine.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        return lrs

    def _after_step(self, before: Progress, bar: Any) -> None:
        """Rows, validation and checkpoint, in the order that a kill in between survives."""
        train, step = self.job.config.train, self.progress.step
        epochs = self._epochs_passed(before, 1)
        if 0 < train.average_from <= epochs:
            self.average.add(self.started.weights.state(self.engine))
        last = self.progress.position == self.table.length
        stopping = 0 < train.max_skipped_steps <= self.in_a_row
        evaluates = last or self._epochs_passed(before, train.eval_every) > 0
        saves = last or step % train.checkpoint_every == 0
        if not (evaluates or saves or stopping or step % train.log_every == 0):
            return
        self._write_steps(bar)
        if stopping:
            raise UserError(
                f"{self.in_a_row} steps in a row had gradients that are not finite (up to step "
                f"{step}); lower optim.lr, or use train.precision bf16 or fp32"
            )
        if evaluates:
            self._evaluate()
        if saves:
            self._commit()
        self.clock = time.perf_counter()

    def _epochs_passed(self, before: Progress, every: float) -> float:
        """The multiple of `every` epochs that ended in this step; 0 if none did."""
        if every == 0:
            return 0.0
        passed, now = (
            math.floor((self.table.epoch(progress.position) + 1e-9) / every)  # 3 / 0.1 < 30
            for progress in (before, self.progress)
        )
        return now * every if now > passed else 0.0

    def _bar(self) -> Any:
        terminal = sys.stderr.isatty()
        return tqdm(
            total=self.table.steps,
            initial=self.progress.step,
            unit="step",
            desc=self.job.config.name,
            disable=not self.job.ranks.is_first,
            mininterval=0.5 if terminal else 30.0,  # a log file wants few lines
            dynamic_ncols=terminal,
        )

    def _write_steps(self, bar: Any) -> None:
        clips = len(self.log) * self.job.config.train.batch_size
        rows = self.log.flush()  # reads the device: the clock is right from here on
        rate = clips / (time.perf_counter() - self.clock)
        self._write([{**row, "clips_per_second": rate} for row in rows])
        loss = rows[-1]["loss"]
        shown = "not finite" if loss is None else f"{loss:.4f}"
        bar.set_postfix_str(f"loss {shown}, {rate:.1f} clips/s", refresh=False)
        bar.update(len(rows))

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.journal is None:
            return
        for row in rows:
            self.journal.append(row)
        if self.engine.monitor.enabled:  # TensorBoard and the like, by train.deepspeed
            self.engine.monitor.write_events(
                [
                    (f"{row['kind']}/{name}", value, row["step"])
                    for row in rows
                    for name, value in row.items()
                    if isinstance(value, float)
                ]
            )

    def _evaluate(self) -> None:
        """Validation on the whole model; the run's random numbers do not notice it."""
        if self.job.validate is None:
            return
        state = checkpoints.random_state()
        module, step = self.engine.module, self.progress.step
        module.eval()
        with torch.no_grad(), whole(module, self.job.config.train):
            self.evaluation = dict(self.job.validate(module, step))
        module.train()
        checkpoints.restore_random_state(state)
        self._write([{"kind": "eval", "step": step, **self.evaluation}])

    def _commit(self) -> None:
        if self.journal is not None:
            self.journal.sync()

        def save(folder: Path, tag: str) -> None:
            self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
            self.average.save(folder / tag)

        with contextlib.redirect_stdout(io.StringIO()):
            checkpoints.commit(
                self.job.config.output_dir / "checkpoints",
                save,
                progress=self.progress,
                config=self.job.config,
                ranks=self.job.ranks,
                keep=self.job.config.train.keep_checkpoints,
                aligned=self.started.aligned,
            )

    def export(self) -> None:
        """Writes the weights, and that the run is finished; every rank calls it."""
        config, step = self.job.config, self.progress.step
        state = self.started.weights.state(self.engine)
        if not self.job.ranks.is_first:
            return
        exported = {WEIGHTS: state} | ({AVERAGED: self.average.mean} if self.average.mean else {})
        for name, tensors in exported.items():
            export_weights(
                config.output_dir / name,
                tensors,
                config=config,
                class_names=self.job.class_names,
                step=step,
                classifier=self.job.classifier,
            )
        mark = {"step": step, "evaluation": self.evaluation}
        write_atomic(config.output_dir / FINISHED, dump_json(mark, indent=1))

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
        self.engine.destroy()


def _on(device: torch.device, batch: Batch) -> Batch:
    return replace(
        batch,
        pixels=batch.pixels.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
    )
