"""From one checkpoint layout to another, with an account of every name."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kineticlip.formats.files import Tensors, write_safetensors, write_torch
from kineticlip.formats.load import (
    Checkpoint,
    interpolate_positions,
    read_checkpoint,
    round_like_clip,
)
from kineticlip.formats.table import OWN_FORMAT, apply_rules
from kineticlip.formats.targets import TARGETS, Target, check_needs
from kineticlip.runtime.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` did, or would do.

    names_read: name in the source -> our name; names_written: our name -> name in the output.
    dropped: source names left behind, and why; notes: everything that changed a value.
    """

    source_format: str
    target_format: str
    num_source: int
    num_written: int
    num_bytes: int
    names_read: dict[str, str]
    names_written: dict[str, str]
    dropped: dict[str, str]
    notes: tuple[str, ...]


def convert(
    path: str | Path,
    out: str | Path,
    *,
    to: str,
    resolution: int | None = None,
    round_fp16: bool = False,
    dry_run: bool = False,
) -> Conversion:
    """Rewrites a checkpoint in another layout; values and dtypes stay to the bit.

    resolution interpolates the position embedding, round_fp16 rounds as `clip.load` does: the
    two options that change values. dry_run writes nothing. The file appears whole or not at all.
    Raises UserError for an unreadable source, an unknown target, a suffix that does not go with
    it, and a source that lacks what the target needs.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to}: unknown format. {did_you_mean(to, TARGETS)}")
    target = TARGETS[to]
    out = Path(out)
    if out.suffix not in target.suffixes:
        raise UserError(f"{out}: format {to} is written as {' or '.join(target.suffixes)}")
    checkpoint = read_checkpoint(path)
    check_needs(target, checkpoint.tensors, str(path))
    tensors, notes = _changed(checkpoint.tensors, resolution, round_fp16, str(path))
    if to != OWN_FORMAT and to not in ("evl", "vitaclip") and "visual.conv1.bias" in tensors:
        notes.append("patch bias folded into the position embedding (one rounding)")
    prepared = target.prepare(tensors, checkpoint.metadata)
    rules = apply_rules(prepared, target.rename, str(path), f"format {to}")
    written = {name: new for name, new in rules.items() if new is not None}
    output = {new: prepared[name] for name, new in written.items()}
    if not dry_run:
        _write(out, target, output, checkpoint)
    dropped = {name: f"not used by {checkpoint.format}" for name in checkpoint.dropped}
    dropped.update({n: f"no part of {to}" for n, new in rules.items() if new is None})
    return Conversion(
        source_format=checkpoint.format,
        target_format=to,
        num_source=len(checkpoint.renamed) + len(checkpoint.dropped),
        num_written=len(output),
        num_bytes=sum(tensor.nbytes for tensor in output.values()),
        names_read=checkpoint.renamed,
        names_written=written,
        dropped=dropped,
        notes=tuple(notes),
    )


def _changed(
    tensors: Tensors, resolution: int | None, round_fp16: bool, source: str
) -> tuple[Tensors, list[str]]:
    notes = []
    if resolution is not None:
        try:
            resized = interpolate_positions(tensors, resolution)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        notes += [
            f"{name} interpolated from {len(tensors[name])} to {len(tensor)} positions"
            for name, tensor in resized.items()
            if tensor.shape != tensors[name].shape
        ]
        tensors = resized
    if round_fp16:
        rounded = round_like_clip(tensors)
        changed = sum(not bool((rounded[n] == t).all()) for n, t in tensors.items())
        notes.append(f"rounded through float16 as clip.load does: {changed} tensors changed")
        tensors = rounded
    return tensors, notes


def _write(out: Path, target: Target, tensors: Tensors, checkpoint: Checkpoint) -> None:
    if target.name == OWN_FORMAT:
        metadata = {key: str(value) for key, value in checkpoint.metadata.items()}
        save_checkpoint(out, tensors, {"source_format": checkpoint.format, **metadata})
    else:
        write_torch(out, target.wrap(tensors, checkpoint.metadata))


def save_checkpoint(path: str | Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes our own format: safetensors whose metadata says so. Atomic."""
    write_safetensors(path, tensors, {**metadata, "format": OWN_FORMAT})


def collapsed(names: dict[str, str]) -> list[tuple[str, str, int]]:
    """Renamings as (old, new, how many), brief enough to print.

    Block numbers and `weight` or `bias` are written as `*`; where only a prefix came off, all
    names that lost it are one entry.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for old, new in names.items():
        if old != new and old.endswith(f".{new}"):
            counts[f"{old.removesuffix(new)}*", "*"] += 1
        else:
            counts[_pattern(old), _pattern(new)] += 1
    return [(old, new, count) for (old, new), count in counts.items()]


def _pattern(name: str) -> str:
    return re.sub(r"\b\d+\b|(?<=[._])(?:weight|bias)$", "*", name)


def as_dict(conversion: Conversion) -> dict[str, Any]:
    """Plain data for JSON."""
    return {**conversion.__dict__, "notes": list(conversion.notes)}
