"""Evaluation protocols on top of scores: zero-shot, mAP, official counts, several splits in one.

Every number is in percent and goes into `extra` of a results folder's summary. Letters: N videos,
C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kineticlip.data.entries import Entry
from kineticlip.evaluation import metrics
from kineticlip.runtime.errors import UserError, did_you_mean

Extra = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the protocols read. scores: [N, C] of the videos that could be scored; labels [N], -1
    where a video has several or none; targets: bool [N, C]. world_size and batch_size are those
    of the official run to compare with."""

    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    targets: NDArray[np.bool_]
    world_size: int = 8
    batch_size: int = 1


def collect(
    scores: NDArray[np.float32], entries: Sequence[Entry], *, world_size: int, batch_size: int
) -> Scores:
    """Scores [N, C] in the order of the entries, without the rows (NaN) of unreadable videos."""
    kept = ~np.isnan(scores).any(axis=1)
    if not kept.any():
        raise UserError("no video could be scored: there is nothing to report")
    return Scores(
        scores=scores[kept],
        labels=np.array([entry.label for entry in entries], dtype=np.int64)[kept],
        targets=targets_of(entries, scores.shape[1])[kept],
        world_size=world_size,
        batch_size=batch_size,
    )


def targets_of(entries: Sequence[Entry], num_classes: int) -> NDArray[np.bool_]:
    """Which classes each entry has: bool [N, C]."""
    targets = np.zeros((len(entries), num_classes), dtype=bool)
    for row, entry in zip(targets, entries, strict=True):
        row[list((entry.label,) if entry.labels is None else entry.labels)] = True
    return targets


def _zero_shot(found: Scores) -> Extra:
    """Text4Vis's and BIKE's protocol: all classes, and ten fixed halves of them."""
    result = metrics.zero_shot(found.scores, found.labels)
    extra: Extra = {"zero_shot_top1": result.top1, "zero_shot_top5": result.top5}
    for name, (mean, std), values in (
        ("top1", result.half_top1_mean_std, result.half_top1),
        ("top5", result.half_top5_mean_std, result.half_top5),
    ):
        extra[f"half_classes_{name}_mean"] = mean
        extra[f"half_classes_{name}_std"] = std
        extra[f"half_classes_{name}"] = ", ".join(f"{value:.3f}" for value in values)
    return extra


def _map(found: Scores) -> Extra:
    """ActivityNet's: clean, and as Text4Vis prints it, with one more softmax (stable sort)."""
    labels = found.labels
    return {
        "map": metrics.mean_average_precision(found.scores, labels),
        "map_official": metrics.official_mean_average_precision(found.scores, labels),
    }


def _multilabel(found: Scores) -> Extra:
    """Charades': the mAP of the whole list, and the running mean that BIKE prints."""
    running = metrics.official_running_mean_average_precision(
        found.scores, found.targets, batch_size=found.batch_size
    )
    return {
        "map_multilabel": metrics.mean_average_precision(found.scores, found.targets),
        "map_multilabel_official": running,
        "map_multilabel_official_batch": found.batch_size,
    }


def _official_padded(found: Scores) -> Extra:
    """What so many official processes would print, their repeated videos counted again."""
    ranks = metrics.rank_of_label(found.scores, found.labels)
    world = found.world_size
    return {
        **{
            f"official_padded_top{k}": metrics.official_padded_accuracy(ranks < k, world_size=world)
            for k in (1, 5)
        },
        "official_padded_processes": world,
    }


PROTOCOLS: dict[str, Callable[[Scores], Extra]] = {
    "zero-shot": _zero_shot,
    "map": _map,
    "multilabel": _multilabel,
    "official-padded": _official_padded,
}


def check_protocols(names: Sequence[str], entries: Sequence[Entry], *, num_classes: int) -> None:
    """UserError for a name that is unknown or does not suit the list: before hours of scoring."""
    several = any(entry.labels is not None for entry in entries)
    for name in names:
        if name not in PROTOCOLS:
            raise UserError(f"--metrics {name}: unknown. {did_you_mean(name, PROTOCOLS)}")
        if several and name != "multilabel":
            raise UserError(f"--metrics {name}: needs a list with one label a video")
    if "zero-shot" in names:
        metrics.check_half_classes(num_classes, [entry.label for entry in entries])
    if "multilabel" in names and not any(entry.labels or entry.label >= 0 for entry in entries):
        raise UserError("--metrics multilabel: no video of the list has a label")


def protocol_numbers(names: Sequence[str], found: Scores) -> Extra:
    """The numbers of these protocols under their names, for `extra` of a summary."""
    extra: Extra = {}
    for name in names:
        extra |= PROTOCOLS[name](found)
    return extra


def over_splits(summaries: Sequence[Mapping[str, Any]]) -> Extra:
    """Mean and standard deviation (of the population, as numpy.std) of each number over splits.

    Numbers that every split has: top1, top5, mean_class_accuracy, and those of `extra`.
    """
    plain = ("top1", "top5", "mean_class_accuracy")
    rows = [{**{name: s[name] for name in plain}, **s["extra"]} for s in summaries]
    combined: Extra = {}
    for name in rows[0]:
        values = [row[name] for row in rows if isinstance(row.get(name), float)]
        if len(values) == len(rows):
            combined[name] = {
                "mean": float(np.mean(values)),
                "std": float(np.std(values)),
                "values": values,
            }
    return combined
