"""An evaluation's summary in a few lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kineticlip.config import EIGHT_BITS
from kineticlip.evaluation.fingerprint import is_untrained
from kineticlip.evaluation.speed import Agreement, Speed
from kineticlip.runtime.journal import Json


def describe(summary: Json) -> list[str]:
    """The summary of one list."""
    return [
        *_accuracy(summary),
        *_views(summary),
        *_extra(summary["extra"]),
        *_bad_videos(summary),
        *_speed(summary),
    ]


def describe_splits(combined: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What `protocols.over_splits` gave, one line a number: mean, deviation, and the splits."""
    return [
        f"{name.replace('_', ' ')}: {each['mean']:.2f} +- {each['std']:.2f} % "
        f"({', '.join(f'{value:.2f}' for value in each['values'])})"
        for name, each in combined.items()
    ]


def _accuracy(summary: Json) -> list[str]:
    lines = []
    if is_untrained(summary["protocol"]):
        lines.append("UNTRAINED weights: these numbers say nothing about any trained model")
    if summary["top1"] is not None:
        low, high = summary["top1_interval"]
        lines.append(
            f"top-1 {summary['top1']:.2f} % [{low:.2f}, {high:.2f}]   "
            f"top-5 {summary['top5']:.2f} %   mean class {summary['mean_class_accuracy']:.2f} %"
        )
    elif summary["scored"]:
        lines.append("no accuracy: no video that was scored has one label")
    else:
        lines.append("no video could be read; is --root right?")
    return lines


def _views(summary: Json) -> list[str]:
    protocol = summary["protocol"]
    videos, classes = _plural(summary["scored"], "video"), _plural(summary["classes"], "class")
    views = (_plural(protocol[f"{what}s"], what) for what in ("clip", "crop", "frame"))
    return [f"{videos} of {classes}, {' x '.join(views)}"]


def _extra(extra: Json) -> list[str]:
    eight = next((name for name in EIGHT_BITS if name in extra), None)
    lines = []
    if eight is not None:
        found = Agreement(**extra[eight])
        lines.append(
            f"{eight} against bf16 on one view of {found.videos} videos: "
            f"top-1 equal in {found.top1_agreement:.0f} %, top-5 set in "
            f"{found.top5_agreement:.0f} %; scores differ by at most "
            f"{found.score_difference:.1e}"
        )
    for name, value in extra.items():
        if name != eight:
            shown = f"{value:.2f} %" if isinstance(value, float) else str(value)
            lines.append(f"{name.replace('_', ' ')}: {shown}")
    return lines


def _bad_videos(summary: Json) -> list[str]:
    lines = []
    if summary["bad"]:
        reasons = "; ".join(f"{count} x {why}" for why, count in summary["bad_reasons"].items())
        bad = _plural(summary["bad"], "video")
        lines.append(f"{bad} could not be decoded, not counted: {reasons}")
        lines += [f"  {name}" for name in summary["bad_videos"]]
        if summary["bad"] > len(summary["bad_videos"]):
            lines.append("  and others; results.parquet names all")
    if summary["repeated"]:
        lines.append(f"lines of the list that repeat a video: {summary['repeated']}")
    return lines


def _speed(summary: Json) -> list[str]:
    if not summary["speed"].get("videos"):
        return []
    speed = Speed.from_json(summary["speed"], "summary")
    share = "the model alone not timed (one group takes too long)"
    if speed.percent_of_model_speed is not None:
        share = f"{speed.percent_of_model_speed:.0f} % of the model alone"
    waits = ", ".join(f"{stage} {percent:.0f} %" for stage, percent in speed.waits.items())
    decoders = ", ".join(f"{name} {count}" for name, count in summary["decoders"].items())
    return [
        f"{speed.videos_per_second:.2f} videos/s, {speed.images_per_second:.1f} images/s, "
        f"{share}; waiting: {waits}",
        f"{speed.tower}; {speed.chunk} images a forward",
        f"decoded by {decoders} ({speed.decoding}); bad files: {summary['bad']}",
        *(f"  {count} of them {why}" for why, count in summary["fallbacks"].items()),
    ]


def _plural(count: int, word: str) -> str:
    ending = "" if count == 1 else "es" if word.endswith("s") else "s"
    return f"{count} {word}{ending}"
