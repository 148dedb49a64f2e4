"""Which videos a list file names, and which of them a run takes.

`read_list` knows seven line formats (`list_formats`) and tells them apart by the first line:

    path label                  videos (Text4Vis, EVL)
    path frames label           folders of frames; ActivityNet's instance lists are these
    path,label                  Vita-CLIP
    path                        without labels: to be scored, not measured
    "a path" label              any of the above, for paths with spaces
    video_id,label,start_time,end_time,total_time      Charades training rows (BIKE)
    id,...,actions,length       Charades test rows: several labels each

Every other line must follow; the first that does not is an error with its number.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from kineticlip.config import Config
from kineticlip.data.entries import Entry, VideoList
from kineticlip.data.few_shot import few_shot
from kineticlip.data.labels import read_text
from kineticlip.data.list_formats import BadLine, NotAnInteger, format_of
from kineticlip.runtime.errors import UserError

CHARADES_RATE = 24.0  # frames a second of the frame folders that BIKE extracts


def read_list(
    path: str | Path,
    root: str | Path = "",
    *,
    num_classes: int | None = None,
    min_frames: int = 0,
    rate: float = CHARADES_RATE,
) -> VideoList:
    """Reads a list file in any of the formats above.

    `root` goes before every relative path. Entries that the list itself gives fewer than
    `min_frames` frames, or none, are left out and named in the result. `rate`: frames a second
    of Charades folders. Raises UserError for a file or line that does not fit, labels outside
    0..num_classes-1 included.
    """
    text, digest = read_text(path, "list")
    form = format_of(text)
    entries: list[Entry] = []
    short, empty, lines = [], [], []
    for number, row in form.rows(text):
        try:
            entry = form.parse(row, rate)
            _check_labels(entry, num_classes)
        except NotAnInteger as error:
            hint = "" if entries else "; if this is a header, leave it out"
            raise UserError(f"{path}:{number}: {error}{hint}") from None
        except BadLine as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if entry.num_frames == 0:
            empty.append(entry.name)
        elif 0 < entry.num_frames < min_frames:
            short.append(entry.name)
        else:
            entries.append(replace(entry, path=os.path.join(root, entry.path)) if root else entry)
            lines.append(number)
    if not entries and not short and not empty:
        raise UserError(f"{path}: the list is empty")
    return VideoList(
        source=str(path),
        sha256=digest,
        entries=tuple(entries),
        min_frames=min_frames,
        short=tuple(short),
        empty=tuple(empty),
        lines=tuple(lines),
    )


def _check_labels(entry: Entry, num_classes: int | None) -> None:
    for label in (entry.label,) if entry.labels is None else entry.labels:
        if label < 0 or (num_classes is not None and label >= num_classes):
            allowed = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
            raise BadLine(f"label {label} is out of range: expected {allowed}")


def training_list(config: Config, num_classes: int) -> VideoList:
    """data.train_list, short entries left out and the K-shot subset taken as configured."""
    data = config.data
    if not data.train_list:
        raise UserError("data.train_list is not set: training needs a list of videos")
    listed = read_list(
        data.train_list,
        data.train_root,
        num_classes=num_classes,
        min_frames=data.min_frames,
        rate=data.frames_per_second,
    )
    if not listed.entries:
        raise UserError(f"{data.train_list}: no video is left to train on; {listed.summary()}")
    if data.shots:
        listed = replace(listed, entries=few_shot(listed.entries, data.shots, config.seed))
    return listed


def scoring_list(config: Config, num_classes: int) -> VideoList:
    """data.val_list; short videos are scored too unless data.val_min_frames leaves them out."""
    data = config.data
    if not data.val_list:
        raise UserError("data.val_list is not set: evaluation needs a list of videos")
    return read_list(
        data.val_list,
        data.val_root,
        num_classes=num_classes,
        min_frames=data.val_min_frames,
        rate=data.frames_per_second,
    )
