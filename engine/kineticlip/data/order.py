"""In which order a training list is walked, over all ranks and passes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kineticlip.config import Config
from kineticlip.data.entries import Entry
from kineticlip.runtime.errors import UserError


@functools.lru_cache(maxsize=4)
def permutation(length: int, seed: int) -> NDArray[np.int64]:
    """The order of one pass over the data, as torch's samplers and EVL's draw it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(length, generator=generator).numpy()


@dataclass(frozen=True, kw_only=True)
class TrainingOrder:
    """Which entries stand in which micro-batch of one rank: a function of the seed alone.

    The passes over `length` entries, each a permutation seeded with seed + pass, make one endless
    stream; micro-batch g of all ranks takes the next world * size places, rank r its contiguous
    `size` of them (EVL's order). `batches` micro-batches make an epoch, the last of them reaching
    into the next pass.
    """

    length: int
    seed: int
    size: int
    rank: int = 0
    world: int = 1

    @property
    def batches(self) -> int:
        """Micro-batches in an epoch, the same number on every rank."""
        return -(-self.length // (self.world * self.size))

    def places(self, number: int) -> list[int]:
        """Where in the endless stream the clips of this rank's micro-batch `number` stand."""
        start = (number * self.world + self.rank) * self.size
        return list(range(start, start + self.size))

    def later(self, place: int, batches: int) -> int:
        """The same place of this rank's micro-batch so many after that of `place`."""
        return place + batches * self.world * self.size

    def locate(self, place: int) -> tuple[int, int]:
        """(pass, index into the entries) of a place of the stream."""
        turn, offset = divmod(place, self.length)
        return turn, int(permutation(self.length, self.seed + turn)[offset])


def order_of(
    entries: Sequence[Entry], config: Config, *, rank: int = 0, world: int = 1
) -> TrainingOrder:
    """The order of a training list. UserError where there is nothing to train on in it."""
    if not entries:
        raise UserError("there is no video to train on")
    if any(entry.labels is not None for entry in entries):
        raise UserError(
            "training needs one label a video; this list has none, or several "
            "(for Charades, train on the rows video_id,label,start_time,end_time,total_time)"
        )
    return TrainingOrder(
        length=len(entries),
        seed=config.seed,
        size=config.train.micro_batch_size,
        rank=rank,
        world=world,
    )
