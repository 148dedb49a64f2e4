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
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from kineticlip.config import Config
from kineticlip.runtime.errors import UserError, did_you_mean

CHARADES_RATE = 24.0  # frames a second of the frame folders that BIKE extracts
QUOTE_HINT = "a path with spaces goes in double quotes"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a list: a video, or a stretch of one, with its label.

    `name` as the list writes it, `path` with the root before it. `num_frames` is what the list
    says (-1: nothing). A stretch begins at frame `first` and is `length` frames long (-1: to
    the end). `labels` holds all of them where videos have several or none; `label` is -1 then.
    """

    name: str
    path: str
    label: int
    num_frames: int = -1
    first: int = 0
    length: int = -1
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class VideoList:
    """The entries of one list file, and what was left out of them."""

    source: str
    sha256: str  # of the file: two results compare only over the same list
    entries: tuple[Entry, ...]
    min_frames: int = 0
    short: tuple[str, ...] = ()  # names of entries with fewer frames than min_frames
    empty: tuple[str, ...] = ()  # names of entries without a frame
    lines: tuple[int, ...] = ()  # where read_list found each entry, counted from 1

    def summary(self) -> str:
        """One line for the log: how many entries, how many left out and why."""
        parts = [f"{self.source}: {len(self.entries)} videos"]
        if self.short:
            parts.append(f"{len(self.short)} with fewer than {self.min_frames} frames left out")
        if self.empty:
            parts.append(f"{len(self.empty)} without frames left out ({self.empty[0]}, ...)")
        return "; ".join(parts)


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
    text, digest = _read_text(path, "list")
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


def _read_text(path: str | Path, kind: str) -> tuple[str, str]:
    """(text, SHA-256 of the bytes)."""
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} file") from None
    except IsADirectoryError:
        raise UserError(
            f"{path}: is a folder, not a {kind}; `kineticlip prepare {path} --good list.txt "
            "--classes names.txt` writes one of it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a {kind}: {error}") from None


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


# name -> file of kineticlip/data; classes stand in the order of the official label indices.
BUILT_IN = {
    "kinetics-400": "kinetics-400.txt",
    "kinetics-600": "kinetics-600.txt",
    # The fixed zero-shot splits (ER-ZSAR, Chen and Huang 2021): 160 each of the 220 classes that
    # Kinetics-400 has under no name. In their alphabetical order, as in the published lists.
    "kinetics-600-split1": "kinetics-600-split1.txt",
    "kinetics-600-split2": "kinetics-600-split2.txt",
    "kinetics-600-split3": "kinetics-600-split3.txt",
    "ucf101": "ucf101.txt",  # official: ApplyEyeMakeup, one word
    "ucf101-split": "ucf101.txt",  # Apply Eye Makeup
    "hmdb51": "hmdb51.txt",
    "activitynet": "activitynet.txt",
}


def read_labels(source: str | Path) -> tuple[str, ...]:
    """The class names, index by index, of a built-in set or a file.

    A file is a CSV with the columns `id,name` (ids 0, 1, 2, ... in order), Charades' class file
    (`c000 Holding some clothes`), or holds one name a line. Names are kept to the letter. Raises
    UserError for an unknown source, a class without a name, ids out of order, a CSV without its
    header and a name that occurs twice. A trained weights file (.safetensors) carries the names
    of its classes.
    """
    name = str(source)
    if name in BUILT_IN:
        names = _built_in(BUILT_IN[name])
        return tuple(map(split_words, names)) if name == "ucf101-split" else names
    if not Path(source).exists():
        known = did_you_mean(name, BUILT_IN)
        raise UserError(f"{source}: no such label file or built-in set. {known}")
    if Path(source).suffix == ".safetensors":
        return _carried_names(source)
    lines = _read_text(source, "label")[0].splitlines()
    first = next((line for line in lines if line.strip()), "")
    if [word.strip().lower() for word in first.split(",")] == ["id", "name"]:
        numbered = _csv_names(lines, source)
    else:
        numbered = _plain_names(lines, source)
    if not numbered:
        raise UserError(f"{source}: no class names in it")
    seen: dict[str, int] = {}
    for number, label in numbered:
        if label in seen:
            raise UserError(f"{source}:{number}: class {label!r} stands on line {seen[label]} too")
        seen[label] = number
    return tuple(seen)


def split_words(name: str) -> str:
    """`ApplyEyeMakeup` -> `Apply Eye Makeup`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)


def _built_in(file: str) -> tuple[str, ...]:
    text = (resources.files("kineticlip.data") / "class_names" / file).read_text(encoding="utf-8")
    return tuple(text.splitlines())


def _carried_names(source: str | Path) -> tuple[str, ...]:
    """The class names in the metadata of a weights file that training has written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="np") as file:
            facts = file.metadata() or {}
        names = tuple(map(str, json.loads(facts.get("class_names", "[]"))))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{source}: no weights that can be read: {error}") from None
    if not names:
        raise UserError(f"{source}: these weights carry no class names; give --labels a file")
    return names


def _plain_names(lines: list[str], source: str | Path) -> list[tuple[int, str]]:
    """One name a line; the codes of Charades come off."""
    rows = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if all(line.startswith(f"c{index:03d} ") for index, (_, line) in enumerate(rows)):
        return [(number, line.partition(" ")[2].strip()) for number, line in rows]
    if len(rows) > 1 and all(re.match(r"\d+\s*,", line) for _, line in rows):
        raise UserError(f"{source}:1: a CSV of classes begins with the header 'id,name'")
    return rows


def _csv_names(lines: list[str], source: str | Path) -> list[tuple[int, str]]:
    numbered: list[tuple[int, str]] = []
    reader = csv.reader(lines)
    rows = [(reader.line_num, row) for row in reader if any(word.strip() for word in row)]
    for number, row in rows[1:]:
        if len(row) != 2 or not row[1].strip():
            raise UserError(f"{source}:{number}: expected 'id,name', got {','.join(row)!r}")
        if row[0].strip() != str(len(numbered)):
            raise UserError(
                f"{source}:{number}: id {row[0].strip()!r} where {len(numbered)} was expected: "
                "ids are the class indices, 0, 1, 2, ... in order"
            )
        numbered.append((number, row[1].strip()))
    return numbered


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
