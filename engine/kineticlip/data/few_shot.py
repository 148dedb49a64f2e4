"""K-shot subsets of a training list."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kineticlip.data.entries import Entry
from kineticlip.runtime.errors import UserError


def few_shot(
    entries: Sequence[Entry], shots: int, seed: int, *, repeat: bool = True
) -> tuple[Entry, ...]:
    """`shots` entries of every class, the same on every rank for one seed.

    Text4Vis's selection: classes in order of first appearance, `random.sample` of each. With
    `repeat` the selection is written out as often as the whole list holds it, so an epoch keeps
    about its length. (The official code leaves the generator unseeded: every GPU trains on a
    different subset.) Raises UserError where a class has too few.
    """
    classes: dict[int, list[Entry]] = {}
    for entry in entries:
        classes.setdefault(entry.label, []).append(entry)
    rng = random.Random(seed)
    chosen: list[Entry] = []
    for label, members in classes.items():
        if len(members) < shots:
            raise UserError(
                f"data.shots={shots}: class {label} has only {len(members)} videos "
                f"({members[0].name}, ...)"
            )
        chosen += rng.sample(members, shots)
    times = len(entries) // len(chosen) if repeat and chosen else 1
    return tuple(chosen * times)
