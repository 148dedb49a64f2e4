"""The optimiser's steps and rates, against the official code's own and by their definition."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kineticlip.config import OptimConfig
from kineticlip.runtime.errors import UserError
from kineticlip.training.optim import Timetable, build_optimizer, rate_factor

GOLDEN = Path(__file__).parents[1] / "golden" / "text4vis"
RUNS = json.loads((GOLDEN / "misc_log.json").read_text())["lr_runs"]


@pytest.mark.parametrize("name", RUNS)
def test_official_rates_of_every_iteration(name: str) -> None:
    run = RUNS[name]
    milestones = run.get("lr_decay_step", ())
    if isinstance(milestones, int):  # the official code's way to say "every so many epochs"
        milestones = range(milestones, run["epochs"] + 1, milestones)
    config = OptimConfig(
        lr=run["lr"],
        clip_ratio=run["clip_ratio"],
        schedule=run["type"],
        warmup_epochs=run["warmup_epochs"],
        milestones=tuple(milestones),
    )
    table = Timetable(
        epoch_length=run["iters_per_epoch"], accumulation=1, epochs=run["epochs"], official=True
    )
    with np.load(GOLDEN / "lr_schedule.npz") as archive:
        expected = archive[name]  # [iterations, 2]: CLIP group, new group
    assert table.length == len(expected)
    factors = [
        rate_factor(table.rate_epoch(position), config, epochs=run["epochs"])
        for position in range(table.length)
    ]
    ours = np.outer(factors, [config.lr * config.clip_ratio, config.lr])
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_official_remainder_joins_the_next_epoch() -> None:
    table = Timetable(epoch_length=7, accumulation=3, epochs=2, official=True)
    ends = [position for position in range(14) if table.is_step(position)]
    assert ends == [2, 5, 9, 12]  # position 6 is carried into the step at 9; 13 is never stepped
    assert (table.length, table.steps) == (13, 4)
    assert [table.steps_before(end + 1) for end in ends] == [1, 2, 3, 4]


def test_clean_steps_run_through_the_epochs() -> None:
    table = Timetable(epoch_length=7, accumulation=3, epochs=2)
    ends = [position for position in range(table.length) if table.is_step(position)]
    assert ends == [2, 5, 8, 11, 14]
    assert (table.length, table.steps) == (15, 5)
    assert [table.steps_before(end + 1) for end in ends] == [1, 2, 3, 4, 5]
    assert table.epoch(7) == 1.0


def test_clean_rates_start_and_end_above_zero() -> None:
    config = OptimConfig(warmup_epochs=1.0)
    table = Timetable(epoch_length=8, accumulation=2, epochs=5)
    rates = [
        rate_factor(table.rate_epoch(position), config, epochs=5)
        for position in range(table.length)
    ]
    assert rates[0] == rates[1] == pytest.approx(1 / 8)  # one rate for both halves of a step
    assert 0 < rates[-1] < 0.05
    steps = rates[1::2]
    assert steps[:4] == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8])
    assert all(later < earlier for earlier, later in itertools.pairwise(steps[4:]))
    mean = sum(steps[4:]) / len(steps[4:])
    assert mean == pytest.approx(0.5, abs=1e-3)  # the cosine's mean; its left ends give 0.53


def test_multistep_and_constant() -> None:
    config = OptimConfig(schedule="multistep", warmup_epochs=0, milestones=(2.0, 4.0))
    factors = [rate_factor(epoch, config, epochs=6) for epoch in (0, 1.99, 2, 3.5, 4, 5)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    config = OptimConfig(schedule="constant", warmup_epochs=2)
    assert [rate_factor(epoch, config, epochs=6) for epoch in (0, 1, 2, 6)] == [0, 0.5, 1, 1]


def test_groups_keep_their_own_rates_and_decay() -> None:
    config = OptimConfig(lr=1e-3, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = build_optimizer(
        [
            {"params": [first], "lr": 1e-4},
            {"params": [], "lr": 1.0},
            {"params": [second], "lr": 1e-3, "weight_decay": 0.0},
        ],
        config,
    )
    kept = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert kept == [(1e-4, 0.2), (1e-3, 0.0)]
    assert optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.defaults["eps"] == 1e-6


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer([{"params": [], "lr": 1.0}], OptimConfig())
    with pytest.raises(UserError, match="shorter than one micro-batch"):
        Timetable(epoch_length=0, accumulation=1, epochs=1)
    with pytest.raises(UserError, match="never reaches a step of 4"):
        Timetable(epoch_length=3, accumulation=4, epochs=1, official=True)
