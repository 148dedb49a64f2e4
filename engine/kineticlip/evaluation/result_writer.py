"""Writes the files of one evaluation: a journal while it runs, the rest when it is finished."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence, Set
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kineticlip.evaluation import lines
from kineticlip.evaluation.fingerprint import Listed
from kineticlip.evaluation.results import (
    CLASSIFIER,
    FORMAT,
    JOURNAL,
    PICTURES,
    SCORES,
    SUMMARY,
    TABLE,
    THUMBNAILS,
)
from kineticlip.evaluation.rows import summarize
from kineticlip.evaluation.speed import Speed
from kineticlip.evaluation.table import table_bytes
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic
from kineticlip.runtime.journal import Journal, Json, dump_json

THUMBNAIL_HEIGHT = 96


class ResultWriter:
    """Journals every finished video of one evaluation and turns the journal into result files.

    Made by `open`; a context manager. A video listed twice is scored once and has two rows.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        *,
        fingerprint: Json,
        entries: Sequence[Listed],
        class_names: Sequence[str],
        keep_scores: bool,
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.entries = list(entries)
        self.class_names = list(class_names)
        self.keep_scores = keep_scores
        self._journal = journal
        self._positions = {video: n for n, (video, _) in reversed(list(enumerate(entries)))}
        self._found: dict[str, Json] = {}  # video -> its line
        self._thumbnails: dict[str, int] = {}  # video -> frames side by side
        for line in journal.rows:
            self._take(line)
        self._again = {video for video, line in self._found.items() if lines.is_bad(line)}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        fingerprint: Mapping[str, Any],
        *,
        entries: Sequence[Listed],
        class_names: Sequence[str],
        keep_scores: bool = False,
        root: str = "",
        sync_seconds: float = 5.0,
    ) -> ResultWriter:
        """Starts a results folder, or continues one of the same protocol: see `done`.

        root: the folder of the videos; a run goes on only over the files that it began with.

        Raises UserError when the folder holds results of another protocol (naming the first
        difference), when another process writes there, and for a label without a class name.
        """
        for video, label in entries:
            if not -1 <= label < len(class_names):
                raise UserError(f"{video}: label {label}, but there are {len(class_names)} classes")
        header = {"format": FORMAT, "keep_scores": keep_scores, "protocol": dict(fingerprint)}
        header["root"] = os.path.realpath(root) if root else ""
        return cls(
            Path(folder),
            Journal(Path(folder) / JOURNAL, header, sync_seconds=sync_seconds),
            fingerprint=dict(fingerprint),
            entries=entries,
            class_names=class_names,
            keep_scores=keep_scores,
        )

    @property
    def done(self) -> Set[str]:
        """Names of the videos with a result by now; not those that an earlier run found bad."""
        return self._found.keys() - self._again

    @property
    def dropped_bytes(self) -> int:
        """Length of the torn line that was cut off the journal on opening."""
        return self._journal.dropped_bytes

    def add(
        self,
        video: str,
        scores: ArrayLike,
        *,
        views: int,
        frames: int,
        decoder: str,
        notes: Sequence[str] = (),
    ) -> None:
        """Journals one scored video: float32 [C], higher is better.

        notes: why its frames were read another way than planned. Raises UserError for NaN or
        infinite scores: they have no ranking worth recording.
        """
        assert np.shape(scores) == (len(self.class_names),), np.shape(scores)
        line = lines.scored_line(
            video,
            scores,
            views=views,
            frames=frames,
            decoder=decoder,
            notes=notes,
            keep_scores=self.keep_scores,
        )
        self._again.discard(video)
        self._append(line)

    def add_bad(self, video: str, reason: str) -> None:
        """Journals a video that could not be decoded, and why."""
        line = lines.bad_line(video, reason)
        self._again.discard(video)
        if self._found.get(video) != line:  # bad for the same reason as in an earlier run
            self._append(line)

    def save_thumbnail(self, video: str, frames: NDArray[np.uint8]) -> None:
        """Keeps a few frames [n, H, W, 3] of a listed video, side by side, as one JPEG."""
        from PIL import Image

        strip = Image.fromarray(np.concatenate(list(frames), axis=1))  # [H, n * W, 3]
        width = max(1, round(strip.width * THUMBNAIL_HEIGHT / strip.height))
        data = io.BytesIO()
        strip.resize((width, THUMBNAIL_HEIGHT)).save(data, "JPEG", quality=85)
        write_atomic(self.folder / THUMBNAILS / f"{self._positions[video]}.jpg", data.getvalue())
        self._append(lines.picture_line(video, len(frames)))

    def save_classifier(self, classifier: ArrayLike) -> None:
        """Keeps the classifier matrix [C, E] for the report's correlation map."""
        from safetensors.numpy import save

        matrix = np.ascontiguousarray(classifier, dtype=np.float32)
        assert matrix.ndim == 2 and len(matrix) == len(self.class_names), matrix.shape
        write_atomic(self.folder / CLASSIFIER, save({"classifier": matrix}))

    def scores(self) -> NDArray[np.float32]:
        """Scores kept so far [N, C], row n for list entry n; NaN for a bad or missing video."""
        scores = np.full((len(self.entries), len(self.class_names)), np.nan, dtype=np.float32)
        for row, (video, _) in zip(scores, self.entries, strict=True):
            kept = lines.kept_scores(self._found.get(video, {}))
            if kept is not None:
                row[:] = kept
        return scores

    def finish(
        self,
        *,
        machine: Mapping[str, Any],
        speed: Speed | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Json:
        """Writes the result files and returns the summary; the journal stays.

        `extra` holds further metrics, name -> number or text. Raises UserError while listed videos
        have no result.
        """
        missing = [video for video, _ in self.entries if video not in self._found]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(self.entries)} videos have no result yet, "
                f"first {missing[0]}"
            )
        self._journal.sync()
        rows = [
            lines.row_of(self._found[video], label, self.class_names)
            for video, label in self.entries
        ]
        made = {"format": FORMAT, "protocol": self.fingerprint, "machine": dict(machine)}
        write_atomic(self.folder / TABLE, table_bytes(rows, made))
        if self.keep_scores:
            write_atomic(self.folder / SCORES, self._score_file(made))
        if self._thumbnails:
            pictures = dump_json(self._pictures(), indent=1)
            write_atomic(self.folder / THUMBNAILS / PICTURES, pictures)
        summary = {
            **made,
            **summarize(rows, self.class_names),
            "speed": speed.to_json() if speed else {},
            "extra": dict(extra or {}),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        write_atomic(self.folder / SUMMARY, dump_json(summary, indent=1))
        return summary

    def close(self) -> None:
        """Brings the journal to the disk and lets another process go on with it."""
        self._journal.close()

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, line: Json) -> None:
        assert line["video"] in self._positions, f"{line['video']} is not in the list"
        self._journal.append(line)
        self._take(line)

    def _take(self, line: Json) -> None:
        video = line["video"]
        if lines.is_picture(line):
            self._thumbnails[video] = line["thumbnail"]
        elif video not in self._found or lines.is_bad(self._found[video]):
            self._found[video] = line  # what was bad may be there by now

    def _score_file(self, made: Json) -> bytes:
        from safetensors.numpy import save

        data: bytes = save({"scores": self.scores()}, metadata={"kineticlip": json.dumps(made)})
        return data

    def _pictures(self) -> list[Json]:
        """The entries of thumbnails/index.json, in list order."""
        shown = sorted((self._positions[video], video) for video in self._thumbnails)
        return [
            {
                "file": f"{n}.jpg",
                "video": video,
                "label": self.entries[n][1],
                "frames": self._thumbnails[video],
            }
            for n, video in shown
        ]
