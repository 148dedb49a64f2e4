"""The files of one evaluation, and how they are read. `result_writer` writes them.

A results folder holds

    journal.jsonl           one line per finished video, appended at once; a killed run goes on here
    results.parquet         one row per list entry, in list order; its metadata say how it was made
    summary.json            accuracy, counts, protocol, machine, speed
    scores.safetensors      if kept: `scores` float32 [N, C], row n for list entry n, NaN if bad
    classifier.safetensors  if saved: `classifier` float32 [C, E], rows in class order
    thumbnails/<n>.jpg      if saved: frames of list entry n side by side; index.json lists them

Percentages are in percent. Nothing in results.parquet or scores.safetensors depends on time, so
a run that was interrupted and continued ends with the same bytes as an unbroken one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kineticlip.evaluation.rows import VideoRow
from kineticlip.evaluation.table import read_table
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.journal import Json

JOURNAL, TABLE, SUMMARY = "journal.jsonl", "results.parquet", "summary.json"
SCORES, CLASSIFIER = "scores.safetensors", "classifier.safetensors"
THUMBNAILS, PICTURES = "thumbnails", "index.json"  # the folder, and the list in it
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Results:
    """A finished results folder, read."""

    folder: Path
    summary: Json
    rows: list[VideoRow]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def classifier(self) -> NDArray[np.float32] | None:
        """The classifier matrix float32 [C, E], if it was saved."""
        return _read_tensor(self.folder / CLASSIFIER, "classifier")

    def scores(self) -> NDArray[np.float32] | None:
        """All scores float32 [N, C] in the order of the rows, if they were kept."""
        return _read_tensor(self.folder / SCORES, "scores")

    def thumbnails(self) -> list[Json]:
        """The entries of thumbnails/index.json: file, video, label, frames; [] if there is none."""
        path = self.folder / THUMBNAILS / PICTURES
        if not path.exists():
            return []
        index = _read_json(path)
        if not isinstance(index, list) or not all(
            isinstance(entry, dict) and {"file", "video"} <= entry.keys() for entry in index
        ):
            raise UserError(f"{path}: expected a list of objects with 'file' and 'video'")
        return index


def read_results(folder: str | Path) -> Results:
    """Reads what `ResultWriter.finish` wrote. Raises UserError for what is missing or malformed."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such results folder")
    for name in (SUMMARY, TABLE):
        if not (folder / name).is_file():
            unfinished = (folder / JOURNAL).is_file()
            hint = "its evaluation has not finished" if unfinished else "not a results folder"
            raise UserError(f"{folder}: no {name} here; {hint}")
    summary = _read_json(folder / SUMMARY)
    if not isinstance(summary, dict) or summary.get("format") != FORMAT:
        raise UserError(f"{folder / SUMMARY}: not a summary of format {FORMAT}")
    rows = read_table(folder / TABLE)
    if len(rows) != summary.get("videos"):
        raise UserError(f"{folder}: {TABLE} has {len(rows)} rows, {SUMMARY} is of another run")
    return Results(folder=folder, summary=summary, rows=rows)


def earlier_summary(folder: str | Path, fingerprint: Mapping[str, Any]) -> Json:
    """The summary that an earlier run of the same protocol left in the folder; {} without one."""
    path = Path(folder) / SUMMARY
    found = _read_json(path) if path.is_file() else {}
    same = isinstance(found, dict) and found.get("protocol") == json.loads(
        json.dumps(dict(fingerprint))
    )
    return found if same else {}


def remove_results(folder: str | Path) -> None:
    """Deletes the files of an evaluation, and nothing else, so that it starts afresh."""
    root = Path(folder)
    for name in (SUMMARY, TABLE, SCORES, CLASSIFIER, JOURNAL):
        (root / name).unlink(missing_ok=True)
    for picture in (root / THUMBNAILS).glob("*.jpg"):
        picture.unlink()
    (root / THUMBNAILS / PICTURES).unlink(missing_ok=True)


def _read_tensor(path: Path, key: str) -> NDArray[np.float32] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.exists():
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    if key not in tensors or tensors[key].ndim != 2:
        raise UserError(f"{path}: expected a matrix '{key}', found {sorted(tensors)}")
    matrix: NDArray[np.float32] = tensors[key].astype(np.float32)
    return matrix


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
