"""One row a video, and the accuracy and counts of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kineticlip.evaluation import metrics
from kineticlip.runtime.journal import Json

INTERVAL_LEVEL = 0.95
NAMED = 5  # bad videos that the summary names itself


@dataclass(frozen=True, kw_only=True)
class VideoRow:
    """One row of results.parquet. prediction is None and the top5 lists are empty if bad."""

    video: str  # path as listed
    label: int
    label_name: str
    prediction: int | None
    top5: list[int]
    top5_names: list[str]
    top5_scores: list[float]  # float32
    correct: bool
    views: int
    frames: int  # of the video file
    decoder: str
    status: str  # ok, bad
    reason: str  # why bad; of a good one, why its frames were read another way than planned


def summarize(rows: Sequence[VideoRow], class_names: Sequence[str]) -> Json:
    """Accuracy and counts of the rows; accuracies are None when no video could be scored.

    Bad videos count in `bad`, not in the accuracies; `top1_bad_as_wrong` counts them as wrong.
    Rows without a single label have no accuracy.
    """
    scored = [row for row in rows if row.status == "ok"]
    labelled = with_one_label(rows)
    hits = [row.correct for row in labelled]
    hits5 = [row.label in row.top5 for row in labelled]
    confusion = confusion_of(labelled, len(class_names))
    return {
        "videos": len(rows),
        "scored": len(scored),
        "bad": len(rows) - len(scored),
        "bad_reasons": _counted(row.reason for row in rows if row.status == "bad"),
        "bad_videos": list(dict.fromkeys(row.video for row in rows if row.status == "bad"))[:NAMED],
        "repeated": len(rows) - len({row.video for row in rows}),
        "decoders": _counted(row.decoder for row in scored),
        "fallbacks": _counted(row.reason for row in scored if row.reason),
        "views": sum(row.views for row in scored),
        "classes": len(class_names),
        "classes_with_videos": int((confusion.sum(axis=1) > 0).sum()),
        "class_names": list(class_names),
        "top1": _number(metrics.mean_percent(hits)),
        "top1_interval": _interval(hits),
        "top5": _number(metrics.mean_percent(hits5)),
        "top5_interval": _interval(hits5),
        "interval_level": INTERVAL_LEVEL,
        "mean_class_accuracy": _number(metrics.mean_class_accuracy(confusion)),
        "top1_bad_as_wrong": _number(
            metrics.mean_percent([row.correct for row in rows if row.label >= 0])
        ),
    }


def with_one_label(rows: Iterable[VideoRow]) -> list[VideoRow]:
    """The scored videos that can be right or wrong: those with one label."""
    return [row for row in rows if row.status == "ok" and row.label >= 0]


def confusion_of(labelled: Sequence[VideoRow], num_classes: int) -> NDArray[np.int64]:
    """Counts [C, C] of the videos of `with_one_label`, truth down, prediction across."""
    predictions = [row.top5[0] for row in labelled]
    labels = [row.label for row in labelled]
    return metrics.confusion_matrix(predictions, labels, num_classes=num_classes)


def _counted(words: Iterable[str]) -> dict[str, int]:
    """Most frequent first, equals by name: the same rows give the same bytes."""
    return dict(sorted(Counter(words).items(), key=lambda item: (-item[1], item[0])))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value  # JSON has no NaN


def _interval(hits: Sequence[bool]) -> list[float] | None:
    return list(metrics.bootstrap_interval(hits, level=INTERVAL_LEVEL)) if hits else None
