"""Finds the fastest block sizes of each kernel on one GPU: the content of configs/<gpu>.json.

A target is one row of a kernel's table, run at an engine shape that the row covers; the row keeps
its conditions and takes the meta-parameters of the fastest candidate. targets.py lists them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from kineticlip_kernels import tuning
from kineticlip_kernels.tuning import Blocks, Table

Run = Callable[[], Any]
Measure = Callable[[Run], float]  # -> milliseconds; raises TooLarge for a launch that cannot be


class TooLarge(Exception):
    """A candidate needs more shared memory or registers than the GPU has."""


@dataclass(frozen=True)
class Target:
    """One row: the sizes that select it, how to run its kernel, and what to try."""

    kernel: str
    sizes: Mapping[str, int]
    make: Callable[[torch.device], Run]
    candidates: tuple[Blocks, ...]


def grid(**choices: tuple[int, ...]) -> tuple[Blocks, ...]:
    """Every combination of the values."""
    return tuple(
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    )


def tune(
    targets: Iterable[Target], device: torch.device, measure: Measure
) -> Iterator[tuple[Target, list[tuple[Blocks, float]]]]:
    """Each target with its candidates that ran and their milliseconds, fastest first.

    Backward passes run on this thread: those of autograd's own would not see the candidate.
    """
    for target in targets:
        run = target.make(device)
        times: list[tuple[Blocks, float]] = []
        for row in target.candidates:
            with (
                torch.autograd.set_multithreading_enabled(False),
                tuning.trial(target.kernel, row),
                suppress(TooLarge),
            ):
                times.append((row, measure(run)))
        yield target, sorted(times, key=lambda item: item[1])


def with_rows(table: Table, chosen: Iterable[tuple[Target, Blocks]]) -> Table:
    """table with the row of each target replaced; conditions stay."""
    content = {kernel: [dict(row) for row in rows] for kernel, rows in table.items()}
    for target, blocks in chosen:
        rows = content[target.kernel]
        number = tuning.row_number(rows, target.sizes)
        conditions = {key: value for key, value in rows[number].items() if key.startswith("max_")}
        rows[number] = conditions | dict(blocks)
    return content
