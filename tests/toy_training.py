"""A model, a method and a loader small enough to train in seconds, and a rank program over them.

As a program: `python tests/toy_training.py JSON`, alone or under the deepspeed launcher. JSON:
{"runs": [{"output": DIR, "train": {...}, "optim": {...}, "drop_out": 0}, ...], "delay": seconds}
with a delay for every micro-batch. Each run trains in turn; the first rank's last line is "done".
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kineticlip.config import Config, DataConfig, OptimConfig, TrainConfig
from kineticlip.data.batch import Batch
from kineticlip.methods.method import Method
from kineticlip.runtime.distributed import Ranks, finish, initialise, read_ranks
from kineticlip.training.job import Job
from kineticlip.training.loop import train
from kineticlip.training.optim import Timetable, rate_factor

CLASSES = 5
ALONE = Ranks()


class Toy(nn.Module):
    """Two trained layers and a scalar, dropout, a frozen layer, a buffer. [B, 8] -> [B, 5]."""

    table: Tensor

    def __init__(self, drop_out: float = 0.1) -> None:
        super().__init__()
        self.drop_out = drop_out
        generator = torch.Generator().manual_seed(7)
        self.frozen = nn.Linear(8, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.frozen.requires_grad_(False)
        self.register_buffer("table", torch.full((CLASSES,), 1 / 3))

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.gelu(self.frozen(pixels.to(self.head.weight.dtype)))  # [B, 16]
        x = F.dropout(F.gelu(self.body(x)), self.drop_out, self.training)
        return self.scale.exp() * self.head(x).float() + self.table


class ToyLoader:
    """Random clips [B, 8], fixed by (seed, epoch, index, rank); labels follow the first pixel."""

    def __init__(self, length: int, batch: int, ranks: Ranks, *, delay: float = 0.0) -> None:
        self.length, self.batch, self.ranks, self.delay = length, batch, ranks, delay

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, self.length):
            time.sleep(self.delay)
            rows = []
            for row in range(self.batch):  # a global batch is the same however it is shared out
                clip = (index * self.ranks.world_size + self.ranks.rank) * self.batch + row
                generator = torch.Generator().manual_seed(epoch * 10_000 + clip)
                rows.append(torch.randn(8, generator=generator))
            pixels = torch.stack(rows)
            labels = (pixels[:, 0] * 2 + 2.5).clamp(0, CLASSES - 1).long()
            yield Batch(pixels=pixels, labels=labels, names=("",) * self.batch)


def toy_loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch.pixels)
    hits = (logits.argmax(dim=1) == batch.labels).float()
    return F.cross_entropy(logits, batch.labels), {"accuracy": hits.mean()}


def toy_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    assert isinstance(model, Toy)
    return [
        {"params": list(model.body.parameters()), "lr": config.optim.lr * config.optim.clip_ratio},
        {"params": [model.scale, *model.head.parameters()], "lr": config.optim.lr},
    ]


TOY = Method(
    build=lambda config, names: Toy(),
    loss=toy_loss,
    score=lambda model, videos, chunk: torch.zeros(len(videos), CLASSES),
    param_groups=toy_groups,
    cost=lambda config, model, classes: [],
)


def toy_config(output: Path | str, *, optim: dict[str, Any] | None = None, **train: Any) -> Config:
    """Eight steps of 8 clips in two epochs, a checkpoint every 3 steps, a row for every one."""
    settings: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 8,
        "micro_batch_size": 2,
        "precision": "fp32",
        "checkpoint_every": 3,
        "log_every": 1,
    }
    rates: dict[str, Any] = {"lr": 0.02, "clip_ratio": 0.5, "warmup_epochs": 0.5}
    return Config(
        name="toy",
        output=str(output),
        data=DataConfig(num_frames=1),
        optim=OptimConfig(**{**rates, **(optim or {})}),
        train=TrainConfig(**{**settings, **train}),
    )


def plain_torch(config: Config) -> tuple[list[float], nn.Module]:
    """The same run in a dozen lines: losses of every step, and the trained model."""
    model, loader = Toy(0.0), ToyLoader(16, 2, ALONE)
    table = Timetable(epoch_length=16, accumulation=4, epochs=config.train.epochs)
    groups = TOY.param_groups(model, config)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.optim.weight_decay)
    batches = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    losses = []
    for step in range(8):
        micro = batches[4 * step : 4 * step + 4]
        parts = [F.cross_entropy(model(batch.pixels), batch.labels) / 4 for batch in micro]
        loss = sum(parts, torch.zeros(()))
        loss.backward()
        if config.train.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clipping)
        factor = rate_factor(table.rate_epoch(4 * step), config.optim, epochs=config.train.epochs)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def rows(output: Path | str, kind: str = "train") -> list[dict[str, Any]]:
    """The metrics of a run, what depends on the clock left out."""
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] == kind]
    return [{k: v for k, v in row.items() if k != "clips_per_second"} for row in found]


def main(argument: str) -> int:
    plan = json.loads(argument)
    ranks = read_ranks(os.environ)
    device = initialise(ranks)
    for run in plan["runs"]:
        config = toy_config(run["output"], optim=run.get("optim"), **run.get("train", {}))
        length = 16 // ranks.world_size
        loader = ToyLoader(
            length, config.train.micro_batch_size, ranks, delay=plan.get("delay", 0.0)
        )
        job = Job(
            config=config,
            method=TOY,
            model=Toy(run.get("drop_out", 0.1)),
            loader=loader,
            ranks=ranks,
            device=device,
            class_names=[f"class {index}" for index in range(CLASSES)],
        )
        train(job)
    if ranks.is_first:
        print("done", flush=True)
    return finish(0, ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
