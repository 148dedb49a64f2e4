"""The training loop: one for every method, every ZeRO stage, one process or many, CPU or GPU.

The loop knows a method only as `loss(model, batch)` and its parameter groups. It owns
accumulation, the schedule, skipped steps, metrics, validation and checkpoints; a run that is
killed at any moment goes on from its last checkpoint with the same losses to the bit.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kineticlip.config import Config
from kineticlip.data.batch import Batch
from kineticlip.formats.trained import export_weights
from kineticlip.methods.method import Method
from kineticlip.runtime.distributed import Ranks, barrier
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.journal import Journal, dump_json, write_atomic
from kineticlip.training import checkpoint as checkpoints
from kineticlip.training.adopt import adopt, official_state
from kineticlip.training.average import WeightAverage
from kineticlip.training.checkpoint import Progress
from kineticlip.training.deepspeed_config import (
    accumulation_steps,
    deepspeed_settings,
    linear_restored,
    scalars_apart,
)
from kineticlip.training.log import METRICS, StepLog, last_evaluation, open_run
from kineticlip.training.optim import Timetable, build_optimizer, epochs_of, rate_factor
from kineticlip_kernels.recompute import recomputed

WEIGHTS = "weights.safetensors"
AVERAGED = "averaged.safetensors"  # beside them, with train.average_from
FINISHED = "finished.json"  # written last: a run without it did not end, whatever its exit status

# (whole model in evaluation mode, step) -> plain numbers; every rank calls it
Validate = Callable[[nn.Module, int], Mapping[str, Any]]


class Loader(Protocol):
    """Micro-batches of this process; the same (epoch, index) is the same batch in every run."""

    def __len__(self) -> int:
        """Micro-batches in an epoch, the same number on every rank."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from index `start` on."""


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
            f"optim.warmup_epochs {optim.warmup_epochs:g} leaves nothing of train.epochs "
            f"{train.epochs:g}"
        )


@linear_restored()
def train(
    config: Config,
    method: Method,
    *,
    model: nn.Module,
    loader: Loader,
    ranks: Ranks,
    device: torch.device,
    class_names: Sequence[str] = (),
    classifier: Mapping[str, Any] | None = None,
    validate: Validate | None = None,
    resume: str = "auto",
    start: str = "",
) -> Outcome:
    """Trains `model` in place from its weights, or from where a checkpoint of the run stands.

    The process group is up (distributed.initialise). Everything goes to config.output_dir:
    config.yaml, environment.json, metrics.jsonl, checkpoints/, weights.safetensors and, last,
    finished.json. class_names and classifier travel with the weights. start: an official
    checkpoint whose optimiser a run without checkpoints goes on with (see adopt). Raises
    UserError for settings that cannot work, a checkpoint that is damaged or another run's (before
    the folder is touched), and after train.max_skipped_steps non-finite steps in a row.
    """
    check_settings(config, world_size=ranks.world_size, cuda=device.type == "cuda")
    accumulation = accumulation_steps(config, world_size=ranks.world_size)
    table = Timetable(
        epoch_length=len(loader),
        accumulation=accumulation,
        epochs=epochs_of(config.train, epoch_length=len(loader), accumulation=accumulation),
        official=config.optim.official_updates,
        at_start=config.optim.rate_at == "start",
    )
    if config.optim.warmup_epochs >= table.epochs:
        raise UserError(
            f"optim.warmup_epochs {config.optim.warmup_epochs:g} leaves nothing of the "
            f"{table.epochs:g} epochs of the run"
        )
    found = checkpoints.find_resumable(resume, config.output_dir, config, ranks)
    groups = method.param_groups(model, config)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    strays = [n for n, p in model.named_parameters() if p.requires_grad != (id(p) in grouped)]
    assert not strays, f"trained but in no group, or frozen and in one: {strays[:3]}"
    optimizer = build_optimizer(groups, config.optim, fused=device.type == "cuda")
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    frozen = _frozen_copies(model) if _shares_out(config) and ranks.is_first else {}
    originals = method.prepare(model, config)
    frozen |= originals if ranks.is_first else {}
    engine = start_engine(config, model, optimizer, ranks=ranks, device=device)
    _seed(config.seed + ranks.rank)
    progress = Progress(epoch_length=len(loader))
    average = WeightAverage()
    if found is not None:
        average.load(found)
        progress = checkpoints.load(found, engine, ranks)
        if progress.epoch_length != len(loader):
            raise UserError(
                f"{found}: an epoch had {progress.epoch_length} micro-batches there and has "
                f"{len(loader)} now; the training list changed (data.train_list)"
            )
    elif start:
        progress = adopt(official_state(start, config, ranks), engine, config, table)
    if ranks.is_first and progress.step:
        where = found or start
        print(f"{config.name}: goes on after step {progress.step}, from {where}", file=sys.stderr)
    elif ranks.is_first and (config.output_dir / METRICS).exists():
        print(f"{config.name}: no checkpoint yet, so from the start again", file=sys.stderr)
    journal = open_run(config, progress, ranks) if ranks.is_first else None
    run = _Run(
        config=config,
        method=method,
        engine=engine,
        table=table,
        rates=rates,
        ranks=ranks,
        device=device,
        validate=validate,
        journal=journal,
        progress=progress,
        evaluation=last_evaluation(journal) if journal is not None else {},
        shapes=shapes,
        frozen=frozen,
        average=average,
    )
    try:
        run.to_the_end(loader)
        state = run.full_precision_state()
        if ranks.is_first:
            exported = {WEIGHTS: state} | ({AVERAGED: average.mean} if average.mean else {})
            for name, tensors in exported.items():
                export_weights(
                    config.output_dir / name,
                    tensors,
                    config=config,
                    class_names=class_names,
                    step=run.progress.step,
                    classifier=classifier or {},
                )
            mark = {"step": run.progress.step, "evaluation": run.evaluation}
            write_atomic(config.output_dir / FINISHED, dump_json(mark, indent=1))
        barrier()
    finally:
        run.close()
    return Outcome(
        step=run.progress.step,
        weights=config.output_dir / WEIGHTS,
        evaluation=run.evaluation,
    )


def start_engine(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    ranks: Ranks,
    device: torch.device,
) -> Any:
    """A DeepSpeed engine around the model; it moves and casts the model's parameters in place."""
    import deepspeed

    settings = deepspeed_settings(config, world_size=ranks.world_size, cuda=device.type == "cuda")
    model.to(device)
    with (
        scalars_apart(model, stage=config.train.zero_stage),
        contextlib.redirect_stdout(io.StringIO()),  # its bf16 optimiser prints memory tables
    ):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
    return engine


def _shares_out(config: Config) -> bool:
    """Whether a rank's module holds only a part of the weights, or rounded ones."""
    return config.train.zero_stage == 3 or config.train.precision != "fp32"


def _frozen_copies(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


def stream(loader: Loader, position: int) -> Iterator[Batch]:
    """Micro-batches from a position on, epoch after epoch, without an end."""
    epoch, start = divmod(position, len(loader))
    while True:
        count = 0
        for batch in loader.epoch(epoch, start):
            count += 1
            yield batch
        assert count == len(loader) - start, "the loader's length is not what it yields"
        epoch, start = epoch + 1, 0


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass(kw_only=True)
class _Run:
    """The loop and what its parts share. journal: open on the first rank only."""

    config: Config
    method: Method
    engine: Any
    table: Timetable
    rates: list[float]
    ranks: Ranks
    device: torch.device
    validate: Validate | None
    journal: Journal | None
    progress: Progress
    in_a_row: int = 0  # skipped steps
    evaluation: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, torch.Size]  # of the state dict, before the engine took over
    frozen: dict[str, Tensor]
    average: WeightAverage

    def to_the_end(self, loader: Loader) -> None:
        """Optimiser steps from where the progress stands; the last one is always saved."""
        self.log = StepLog(self.ranks.world_size)
        self.engine.train()
        batches = stream(loader, self.progress.position)
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
            lean = recomputed() if self.config.train.recompute_outputs else contextlib.nullcontext()
            with lean:
                loss, metrics = self.method.loss(self.engine, _on(self.device, next(batches)))
            self.engine.backward(loss)
            self.log.add(loss, metrics)
            if not ends:
                self.engine.step()
            position += 1
        lrs = self._set_rates(position - 1)
        applied, norm = self._update()
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
                "lr": lrs,
                "grad_norm": norm,
                "skipped_steps": self.progress.skipped,
            }
        )

    def _set_rates(self, position: int) -> list[float]:
        epoch = self.table.rate_epoch(position)
        factor = rate_factor(epoch, self.config.optim, epochs=self.table.epochs)
        lrs = [rate * factor for rate in self.rates]
        for group, lr in zip(self.engine.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        return lrs

    def _update(self) -> tuple[bool, float | Tensor]:
        """The optimiser's step: whether it was taken, and the norm of its gradient.

        A step with non-finite gradients is left out. ZeRO does that by itself; at stage 0
        DeepSpeed would write them into the weights, and cannot clip those without dimensions.
        """
        engine, train = self.engine, self.config.train
        if train.zero_stage == 0:
            graded = [p for p in engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in graded])
            if not torch.isfinite(norm):
                engine.zero_grad()
                return False, norm
            if train.gradient_clipping:
                torch.nn.utils.clip_grads_with_norm_(graded, train.gradient_clipping, norm)
            engine.step()
            return True, norm
        skipped = engine.skipped_steps
        engine.step()
        norm = engine.get_global_grad_norm()
        return engine.skipped_steps == skipped, math.nan if norm is None else norm

    def _after_step(self, before: Progress, bar: Any) -> None:
        """Rows, validation and checkpoint, in the order that a kill in between survives."""
        train, step = self.config.train, self.progress.step
        epochs = self._epochs_passed(before, 1)
        if 0 < train.average_from <= epochs:
            self.average.add(self.full_precision_state())
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
            desc=self.config.name,
            disable=not self.ranks.is_first,
            mininterval=0.5 if terminal else 30.0,  # a log file wants few lines
            dynamic_ncols=terminal,
        )

    def _write_steps(self, bar: Any) -> None:
        clips = len(self.log) * self.config.train.batch_size
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
        if self.validate is None:
            return
        state = checkpoints.random_state()
        module, step = self.engine.module, self.progress.step
        module.eval()
        with torch.no_grad(), self._whole(module):
            self.evaluation = dict(self.validate(module, step))
        module.train()
        checkpoints.restore_random_state(state)
        self._write([{"kind": "eval", "step": step, **self.evaluation}])

    def _whole(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """At stage 3 gathers every parameter for as long as the context lasts."""
        if self.config.train.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        gathered: contextlib.AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
            list(module.parameters())
        )
        return gathered

    def _commit(self) -> None:
        if self.journal is not None:
            self.journal.sync()

        def save(folder: Path, tag: str) -> None:
            self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
            self.average.save(folder / tag)

        with contextlib.redirect_stdout(io.StringIO()):
            checkpoints.commit(
                self.config.output_dir / "checkpoints",
                save,
                progress=self.progress,
                config=self.config,
                ranks=self.ranks,
                keep=self.config.train.keep_checkpoints,
            )

    def full_precision_state(self) -> dict[str, Tensor]:
        """The model's state dict in float32 on the first rank, {} on others; every rank calls it.

        Trained parameters come from the optimiser's own copies, frozen ones as they were built:
        the engine rounds those it runs.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        split = _shares_out(self.config)
        state: dict[str, Tensor] = {}
        for name, value in self.engine.module.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                value = safe_get_full_fp32_param(value) if split and value.requires_grad else value
                value = self.frozen.get(name, value)
            if self.ranks.is_first:
                state[name] = value.detach().cpu().reshape(self.shapes[name])
        return state

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
