"""What a training run writes beside its checkpoints: who ran it, and a row for every step.

metrics.jsonl: a header with the run's config, then rows of kind `train` (one an optimiser step)
and `eval`, in the order of the steps, each step once, however often the run was resumed.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch
import yaml
from torch import Tensor

from kineticlip.config import Config, config_to_dict
from kineticlip.methods.method import Metrics
from kineticlip.runtime.distributed import Ranks
from kineticlip.runtime.files import write_atomic
from kineticlip.runtime.journal import Journal, dump_json
from kineticlip.runtime.machine import machine_record, software_record
from kineticlip.training.checkpoint import Progress, identity

METRICS = "metrics.jsonl"


def open_run(config: Config, progress: Progress, ranks: Ranks) -> Journal:
    """The run's folder with its records, and its metrics, cut back to where the run stands.

    Raises UserError where the folder holds the metrics of another config's run, and where
    another process is writing to them.
    """
    output = config.output_dir
    path = output / METRICS
    header = {"kind": "run", "config": identity(config)}
    Journal(path, header).close()  # refuses another config's rows, and a second process
    kept = [json.loads(line) for line in path.read_bytes().splitlines()]
    kept = [row for row in kept if row.get("step", 0) <= progress.step]
    write_atomic(path, b"".join(dump_json(row) for row in kept))
    journal = Journal(path, header)
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    write_atomic(output / "config.yaml", text.encode())
    environment = {
        "command": sys.argv,
        "world_size": ranks.world_size,
        "machine": machine_record(),
        "software": software_record(),
    }
    write_atomic(output / "environment.json", dump_json(environment, indent=1))
    return journal


def last_evaluation(journal: Journal) -> dict[str, Any]:
    """The newest validation among the rows that a resumed run found; empty if there is none."""
    found = [row for row in journal.rows if row["kind"] == "eval"]
    return {k: v for k, v in found[-1].items() if k not in ("kind", "step")} if found else {}


class StepLog:
    """Losses and metrics of optimiser steps, kept on the device until they are written."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._count = 0
        self._steps: list[tuple[dict[str, Any], Tensor]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, loss: Tensor, metrics: Metrics) -> None:
        """One micro-batch."""
        self._names = ["loss", *sorted(metrics)]
        values = [loss, *(metrics[name] for name in self._names[1:])]
        row = torch.stack([value.detach().float() for value in values])
        self._sums = row if self._sums is None else self._sums + row
        self._count += 1

    def end_step(self, facts: dict[str, Any]) -> None:
        """Closes a step over the micro-batches since the last one."""
        assert self._sums is not None
        self._steps.append((facts, self._sums / self._count))
        self._sums, self._count = None, 0

    def flush(self) -> list[dict[str, Any]]:
        """One row a step, means over micro-batches and ranks; every rank calls it."""
        if not self._steps:
            return []
        means = torch.stack([values for _, values in self._steps])  # [steps, names]
        if self._world_size > 1:
            torch.distributed.all_reduce(means)
            means /= self._world_size
        rows = []
        for (facts, _), values in zip(self._steps, means.tolist(), strict=True):
            loss, *rest = [_finite(value) for value in values]
            facts["grad_norm"] = _finite(float(facts["grad_norm"]))
            rows.append({**facts, "loss": loss, **dict(zip(self._names[1:], rest, strict=True))})
        self._steps = []
        return rows


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
