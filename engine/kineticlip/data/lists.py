"""Which videos and which classes: list files, label files, K-shot subsets.

`read_list` knows seven line formats and tells them apart by the first line:

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

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kineticlip.config import Config
from kineticlip.data.entries import Entry, VideoList
from kineticlip.data.few_shot import few_shot
from kineticlip.data.labels import read_text
from kineticlip.runtime.errors import UserError

CHARADES_RATE = 24.0  # frames a second of the frame folders that BIKE extracts
QUOTE_HINT = "a path with spaces goes in double quotes"


class _BadLine(ValueError):
    """What is wrong with a line; `read_list` adds where."""


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
    rows, parse = _format_of(text, rate)
    entries: list[Entry] = []
    short, empty, lines = [], [], []
    for number, row in rows:
        try:
            entry = parse(row)
            for label in (entry.label,) if entry.labels is None else entry.labels:
                if label < 0 or (num_classes is not None and label >= num_classes):
                    allowed = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
                    raise _BadLine(f"label {label} is out of range: expected {allowed}")
        except _BadLine as error:
            first = not entries and "not an integer" in str(error)
            hint = "; if this is a header, leave it out" if first else ""
            raise UserError(f"{path}:{number}: {error}{hint}") from None
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


def _format_of(text: str, rate: float) -> tuple[Iterable[tuple[int, Any]], Callable[[Any], Entry]]:
    """Numbered rows of a list, and what makes an entry of one; the first line decides."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return lines, _video_line
    first = lines[0][1]
    header = {word.strip() for word in first.split(",")}
    if {"video_id", "label", "start_time", "end_time", "total_time"} <= header:
        return _csv_rows(text), lambda row: _charades_stretch(row, rate)
    if {"id", "actions", "length"} <= header:
        return _csv_rows(text), _charades_video
    fields = _split_path(first)[1]
    if fields and _is_integer(fields[-1]):
        return lines, _frames_line if len(fields) == 2 else _video_line
    if "," in first and not first.lstrip().startswith('"'):
        return lines, _comma_line
    return lines, _video_line if fields else _path_line


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text))
    for row in reader:
        yield reader.line_num, row


def _split_path(line: str) -> tuple[str, list[str]]:
    """The path, quoted or up to the first space, and the fields after it."""
    if '"' in line:
        quoted = re.match(r'\s*"([^"]*)"[\s,]*(.*)', line)
        if quoted:
            return quoted[1], quoted[2].split()
    path, *fields = line.split()
    return path, fields


def _video_line(line: str) -> Entry:
    path, fields = _split_path(line)
    if len(fields) != 1:
        raise _BadLine(f"expected 'path label', got {1 + len(fields)} fields; {QUOTE_HINT}")
    return Entry(path, path, _integer(fields[0], "label"))


def _path_line(line: str) -> Entry:
    path, fields = _split_path(line)
    if fields:
        raise _BadLine(
            f"expected a path alone, as in the first line, got {1 + len(fields)} fields; "
            f"{QUOTE_HINT}"
        )
    if re.search(r"[;|:]\d+$", path):
        raise _BadLine(f"{path!r} looks like a path and a label; write a space or a comma between")
    return Entry(path, path, -1, labels=())


def _frames_line(line: str) -> Entry:
    path, fields = _split_path(line)
    if len(fields) != 2:
        raise _BadLine(f"expected 'path frames label', got {1 + len(fields)} fields; {QUOTE_HINT}")
    if not _is_integer(fields[0]):
        raise _BadLine(f"{fields[0]!r} is not a number of frames; {QUOTE_HINT}")
    frames = _integer(fields[0], "number of frames")
    if frames < 0:
        raise _BadLine(f"the number of frames is negative: {frames}")
    return Entry(path, path, _integer(fields[1], "label"), num_frames=frames)


def _comma_line(line: str) -> Entry:
    path, comma, label = line.strip().rpartition(",")
    if not comma or not path:
        raise _BadLine("expected 'path,label'")
    path = path.strip().strip('"')
    return Entry(path, path, _integer(label, "label"))


def _charades_stretch(row: dict[str, str], rate: float) -> Entry:
    """A labelled stretch of a Charades video, cut as BIKE cuts it; some are empty."""
    start, end, total = (_number(row, key) for key in ("start_time", "end_time", "total_time"))
    length = max(0, int(min(end, total) * rate - start * rate)) if end > start else 0
    video = row["video_id"]
    return Entry(
        f"{video} {row['start_time']}-{row['end_time']}",
        video,
        _charades_class(row["label"]),
        num_frames=length,
        first=int(start * rate),
        length=length,
    )


def _charades_video(row: dict[str, str]) -> Entry:
    """A whole Charades video; `actions` reads `c092 11.90 21.20;c147 0.00 12.60`, or is empty."""
    actions = [action.split()[0] for action in (row["actions"] or "").split(";") if action.strip()]
    labels = tuple(sorted({_charades_class(action) for action in actions}))
    return Entry(row["id"], row["id"], -1, labels=labels)


def _charades_class(word: str | None) -> int:
    if not word or not re.fullmatch(r"c\d{3}", word):
        raise _BadLine(f"expected a class like c092, got {word!r}")
    return int(word[1:])


def _number(row: dict[str, str], key: str) -> float:
    try:
        return float(row[key])
    except (TypeError, ValueError):
        raise _BadLine(f"{key} is not a number: {row[key]!r}") from None


def _is_integer(word: str) -> bool:
    return (word[1:] if word[:1] in ("+", "-") else word).isdecimal()


def _integer(word: str, what: str) -> int:
    if not _is_integer(word.strip()):
        raise _BadLine(f"the {what} is not an integer: {word.strip()!r}")
    return int(word)


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
