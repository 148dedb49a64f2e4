"""Entries to the text of a list file: what `read_list` reads as the same entries again."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kineticlip.config import Config
from kineticlip.data.entries import Entry
from kineticlip.data.list_formats import STRETCH_COLUMNS, BadLine, format_of
from kineticlip.data.lists import CHARADES_RATE
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic

FEW_SHOT_LIST = "few_shot.txt"


def list_text(entries: Sequence[Entry], *, rate: float = CHARADES_RATE) -> str:
    """Lines `path label`, `path frames label` or `path`; Charades' columns for stretches.

    rate: frames a second, by which stretches are counted and have to be read again. What comes
    out is read back: UserError names the first entry that no line of a list says as it is.
    """
    if any(entry.length >= 0 for entry in entries):
        text = _stretch_rows(entries, rate)
    else:
        text = "".join(map(_line, entries))
    form = format_of(text)
    rows = [row for _, row in form.rows(text)]
    for number, entry in enumerate(entries):
        try:
            same = _facts(form.parse(rows[number], rate)) == _facts(entry)
        except (BadLine, IndexError):
            same = False
        if not same:
            raise UserError(
                f"{entry.name!r}: no line of a list can say this video's name, labels and stretch"
            )
    return text


def _facts(entry: Entry) -> tuple[Any, ...]:
    """All that lines say of an entry; without labels no number of frames either."""
    frames = entry.num_frames if entry.label >= 0 else -1
    return entry.name, entry.label, entry.labels or (), frames, entry.first, entry.length


def _line(entry: Entry) -> str:
    labelled = entry.label >= 0
    quoted = re.search(r"\s", entry.name) or (not labelled and "," in entry.name)
    words = [f'"{entry.name}"' if quoted else entry.name]
    if labelled and entry.num_frames >= 0:
        words.append(str(entry.num_frames))
    if labelled:
        words.append(str(entry.label))
    return " ".join(words) + "\n"


def _stretch_rows(entries: Iterable[Entry], rate: float) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(STRETCH_COLUMNS)
    for entry in entries:
        video, _, times = entry.name.rpartition(" ")  # as the reader names a stretch
        start, _, end = times.rpartition("-")
        table.writerow([video, f"c{entry.label:03d}", start, end, _total(entry, start, end, rate)])
    return text.getvalue()


def _total(entry: Entry, start: str, end: str, rate: float) -> str:
    """The length of the video in seconds as far as a stretch tells: where it ends at the latest."""
    try:
        first, last = float(start), float(end)
    except ValueError:
        return end  # no stretch of a list: reading it back says so
    if int(last * rate - first * rate) == entry.length:
        return end
    return repr(first + (entry.length + 0.5) / rate)  # the video ends within the stretch


def write_few_shot(config: Config, entries: Sequence[Entry]) -> Path:
    """Lists the K-shot subset of a run in its folder, each video once, as a list file again.

    UserError where the folder lists another subset already: it is another run's.
    """
    path = config.output_dir / FEW_SHOT_LIST
    text = list_text(tuple(dict.fromkeys(entries)), rate=config.data.frames_per_second)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: another run's few-shot videos; choose another output")
    write_atomic(path, text.encode())
    return path
