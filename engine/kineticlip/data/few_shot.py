"""K-shot subsets of a training list."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from kineticlip.config import Config
from kineticlip.data.entries import Entry
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic

FEW_SHOT_LIST = "few_shot.txt"


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


def write_few_shot(config: Config, entries: Sequence[Entry]) -> Path:
    """Lists the K-shot subset of a run in its folder, each video once, as a list file again.

    UserError where the folder lists another subset already: it is another run's.
    """
    path = config.output_dir / FEW_SHOT_LIST
    lines = []
    for entry in dict.fromkeys(entries):
        name = f'"{entry.name}"' if re.search(r"\s", entry.name) else entry.name
        frames = f" {entry.num_frames}" if entry.num_frames >= 0 else ""
        lines.append(f"{name}{frames} {entry.label}\n")
    text = "".join(lines)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: another run's few-shot videos; choose another output")
    write_atomic(path, text.encode())
    return path
