"""The formats of list files, told apart by the first line; see `lists` for what they look like.

Every other line must follow the first. A new format is one row of FORMATS.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kineticlip.data.entries import Entry

QUOTE_HINT = "a path with spaces goes in double quotes"
STRETCH_COLUMNS = ("video_id", "label", "start_time", "end_time", "total_time")


class BadLine(ValueError):
    """What is wrong with a line; whoever reads the list adds where."""


class NotAnInteger(BadLine):
    """A word where a number should be: in the first line it may be a header's."""


@dataclass(frozen=True, kw_only=True)
class ListFormat:
    """matches(first line); rows(text): numbered from 1; parse(row, frames a second) -> Entry.

    Rows and parsing raise BadLine for what does not fit.
    """

    matches: Callable[[str], bool]
    rows: Callable[[str], Iterable[tuple[int, Any]]]
    parse: Callable[[Any, float], Entry]


def format_of(text: str) -> ListFormat:
    """The format of a list file's text, by its first line that is not blank."""
    first = next((line for line in text.split("\n") if line.strip()), None)
    if first is None:
        return FORMATS[-1]  # there is no line to parse
    return next(form for form in FORMATS if form.matches(first))


def _lines(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


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
        raise BadLine(f"expected 'path label', got {1 + len(fields)} fields; {QUOTE_HINT}")
    return Entry(path, path, _integer(fields[0], "label"))


def _path_line(line: str) -> Entry:
    path, fields = _split_path(line)
    if fields:
        raise BadLine(
            f"expected a path alone, as in the first line, got {1 + len(fields)} fields; "
            f"{QUOTE_HINT}"
        )
    if re.search(r"[;|:]\d+$", path):
        raise BadLine(f"{path!r} looks like a path and a label; write a space or a comma between")
    return Entry(path, path, -1, labels=())


def _frames_line(line: str) -> Entry:
    path, fields = _split_path(line)
    if len(fields) != 2:
        raise BadLine(f"expected 'path frames label', got {1 + len(fields)} fields; {QUOTE_HINT}")
    if not _is_integer(fields[0]):
        raise BadLine(f"{fields[0]!r} is not a number of frames; {QUOTE_HINT}")
    frames = _integer(fields[0], "number of frames")
    if frames < 0:
        raise BadLine(f"the number of frames is negative: {frames}")
    return Entry(path, path, _integer(fields[1], "label"), num_frames=frames)


def _comma_line(line: str) -> Entry:
    path, comma, label = line.strip().rpartition(",")
    if not comma or not path:
        raise BadLine("expected 'path,label'")
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
        raise BadLine(f"expected a class like c092, got {word!r}")
    return int(word[1:])


def _number(row: dict[str, str], key: str) -> float:
    try:
        return float(row[key])
    except (TypeError, ValueError):
        raise BadLine(f"{key} is not a number: {row[key]!r}") from None


def _is_integer(word: str) -> bool:
    return (word[1:] if word[:1] in ("+", "-") else word).isdecimal()


def _integer(word: str, what: str) -> int:
    if not _is_integer(word.strip()):
        raise NotAnInteger(f"the {what} is not an integer: {word.strip()!r}")
    return int(word)


def _has_columns(line: str, *names: str) -> bool:
    return set(names) <= {word.strip() for word in line.split(",")}


def _ends_in_integer(line: str, *, fields: int = 0) -> bool:
    """Whether the last of the fields behind the path is one; fields: how many there must be."""
    found = _split_path(line)[1]
    return bool(found) and fields in (0, len(found)) and _is_integer(found[-1])


FORMATS = (
    ListFormat(
        matches=lambda line: _has_columns(line, *STRETCH_COLUMNS),
        rows=_csv_rows,
        parse=_charades_stretch,
    ),
    ListFormat(
        matches=lambda line: _has_columns(line, "id", "actions", "length"),
        rows=_csv_rows,
        parse=lambda row, rate: _charades_video(row),
    ),
    ListFormat(
        matches=lambda line: _ends_in_integer(line, fields=2),
        rows=_lines,
        parse=lambda line, rate: _frames_line(line),
    ),
    ListFormat(
        matches=lambda line: (
            "," in line and not line.lstrip().startswith('"') and not _ends_in_integer(line)
        ),
        rows=_lines,
        parse=lambda line, rate: _comma_line(line),
    ),
    ListFormat(
        matches=lambda line: bool(_split_path(line)[1]),
        rows=_lines,
        parse=lambda line, rate: _video_line(line),
    ),
    ListFormat(matches=lambda line: True, rows=_lines, parse=lambda line, rate: _path_line(line)),
)
