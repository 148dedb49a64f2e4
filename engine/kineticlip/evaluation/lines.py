"""The lines of an evaluation's journal: a scored video, a bad one, or a kept picture."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kineticlip.evaluation import metrics
from kineticlip.evaluation.rows import VideoRow
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.journal import Json


def scored_line(
    video: str,
    scores: ArrayLike,
    *,
    views: int,
    frames: int,
    decoder: str,
    notes: Sequence[str] = (),
    keep_scores: bool,
) -> Json:
    """A scored video: its best five of the scores float32 [C], or all of them to keep too.

    Raises UserError for NaN or infinite scores: they have no ranking worth recording.
    """
    row = np.asarray(scores, dtype=np.float32)
    if not np.isfinite(row).all():
        raise UserError(
            f"{video}: its scores are not finite; the weights are broken or fp16 overflowed"
        )
    top = metrics.top_classes(row[None], 5)[0]
    line: Json = {
        "video": video,
        "top5": top.tolist(),
        "top5_scores": row[top].tolist(),
        "views": views,
        "frames": frames,
        "decoder": decoder,
    }
    if notes:
        line["notes"] = "; ".join(notes)
    if keep_scores:
        line["scores"] = base64.b64encode(row.astype("<f4").tobytes()).decode()
    return line


def bad_line(video: str, reason: str) -> Json:
    """A video that could not be decoded, and why in one line."""
    return {"video": video, "reason": " ".join(reason.split()) or "unknown"}


def picture_line(video: str, frames: int) -> Json:
    """A video of which so many frames were kept as a picture."""
    return {"video": video, "thumbnail": frames}


def is_scored(line: Json) -> bool:
    return "views" in line


def is_bad(line: Json) -> bool:
    return "reason" in line


def is_picture(line: Json) -> bool:
    return "thumbnail" in line


def kept_scores(line: Json) -> NDArray[np.float32] | None:
    """The scores float32 [C] of a video, if they were kept."""
    if "scores" not in line:
        return None
    return np.frombuffer(base64.b64decode(line["scores"]), "<f4")


def row_of(line: Json, label: int, class_names: Sequence[str]) -> VideoRow:
    """The row of results.parquet for a list entry with this label, from its video's line."""
    top: list[int] = line.get("top5", [])
    return VideoRow(
        video=line["video"],
        label=label,
        label_name=class_names[label] if label >= 0 else "",
        prediction=top[0] if top else None,
        top5=top,
        top5_names=[class_names[number] for number in top],
        top5_scores=line.get("top5_scores", []),
        correct=bool(top) and top[0] == label,
        views=line.get("views", 0),
        frames=line.get("frames", 0),
        decoder=line.get("decoder", ""),
        status="bad" if is_bad(line) else "ok",
        reason=str(line.get("reason", line.get("notes", ""))),
    )
