"""The files of one evaluation: written while it runs, finished atomically, read by the report.

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

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kineticlip.config import Config, config_to_dict
from kineticlip.evaluation import metrics
from kineticlip.evaluation.rows import VideoRow, summarize
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic
from kineticlip.runtime.journal import Journal, Json, dump_json

JOURNAL, TABLE, SUMMARY = "journal.jsonl", "results.parquet", "summary.json"
SCORES, CLASSIFIER, THUMBNAILS = "scores.safetensors", "classifier.safetensors", "thumbnails"
FORMAT = 1
UNTRAINED = "untrained"  # the protocol's weights id of a model with random weights
THUMBNAIL_HEIGHT = 96
LIST_KEYS = ("train_list", "train_root", "val_list", "val_root", "labels")

Entry = tuple[str, int]  # a list line: path as listed, label (-1: several labels, or none)


def protocol_fingerprint(
    config: Config, entries: Sequence[Entry], *, class_names: Sequence[str], weights: str
) -> Json:
    """What an evaluation's rows depend on, as plain JSON; two equal ones give equal rows.

    `weights` identifies the tensors (a tag, or a file's SHA-256); UNTRAINED marks random ones.
    Keys of the configuration that cannot change a score are left out.
    """
    plain = config_to_dict(config)
    for key in ("name", "output", "train", "optim"):
        del plain[key]
    for key in (*LIST_KEYS, "workers", "probe_cache"):
        del plain["data"][key]
    return {
        "method": config.method,
        "arch": config.model.arch,
        "weights": weights,
        "classifier": config.classifier.source,
        "frames": config.data.num_frames,
        "clips": config.test.clips,
        "crops": config.test.crops,
        "resolution": config.data.resolution,
        "precision": config.eval.precision,
        "list_sha256": _sha256("".join(f"{video} {label}\n" for video, label in entries)),
        "labels_sha256": _sha256("".join(f"{name}\n" for name in class_names)),
        "config_sha256": _sha256(json.dumps(plain, sort_keys=True)),
        "config": plain,
    }


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
        entries: Sequence[Entry],
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
        self._rows: dict[str, Json] = {}
        self._thumbnails: dict[str, int] = {}  # video -> frames side by side
        for line in journal.rows:
            self._take(line)
        self._again = {video for video, row in self._rows.items() if "reason" in row}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        fingerprint: Mapping[str, Any],
        *,
        entries: Sequence[Entry],
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
        return self._rows.keys() - self._again

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
        row = np.asarray(scores, dtype=np.float32)
        assert row.shape == (len(self.class_names),), (row.shape, len(self.class_names))
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
        if self.keep_scores:
            line["scores"] = base64.b64encode(row.astype("<f4").tobytes()).decode()
        self._again.discard(video)
        self._append(line)

    def add_bad(self, video: str, reason: str) -> None:
        """Journals a video that could not be decoded, and why."""
        line = {"video": video, "reason": " ".join(reason.split()) or "unknown"}
        self._again.discard(video)
        if self._rows.get(video) != line:  # bad for the same reason as in an earlier run
            self._append(line)

    def save_thumbnail(self, video: str, frames: NDArray[np.uint8]) -> None:
        """Keeps a few frames [n, H, W, 3] of a listed video, side by side, as one JPEG."""
        from PIL import Image

        strip = Image.fromarray(np.concatenate(list(frames), axis=1))  # [H, n * W, 3]
        width = max(1, round(strip.width * THUMBNAIL_HEIGHT / strip.height))
        data = io.BytesIO()
        strip.resize((width, THUMBNAIL_HEIGHT)).save(data, "JPEG", quality=85)
        write_atomic(self.folder / THUMBNAILS / f"{self._positions[video]}.jpg", data.getvalue())
        self._append({"video": video, "thumbnail": len(frames)})

    def save_classifier(self, classifier: ArrayLike) -> None:
        """Keeps the classifier matrix [C, E] for the report's correlation map."""
        from safetensors.numpy import save

        matrix = np.ascontiguousarray(classifier, dtype=np.float32)
        assert matrix.ndim == 2 and len(matrix) == len(self.class_names), matrix.shape
        write_atomic(self.folder / CLASSIFIER, save({"classifier": matrix}))

    def finish(
        self,
        *,
        machine: Mapping[str, Any],
        speed: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Json:
        """Writes the result files and returns the summary; the journal stays.

        `speed` is a mapping such as evaluate.Clock.summary gives; `extra` holds further metrics,
        name -> number or text. Raises UserError while listed videos have no result.
        """
        missing = [video for video, _ in self.entries if video not in self._rows]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(self.entries)} videos have no result yet, "
                f"first {missing[0]}"
            )
        self._journal.sync()
        rows = [self._row(video, label) for video, label in self.entries]
        made = {"format": FORMAT, "protocol": self.fingerprint, "machine": dict(machine)}
        write_atomic(self.folder / TABLE, _parquet(rows, made))
        if self.keep_scores:
            write_atomic(self.folder / SCORES, self._score_file(made))
        if self._thumbnails:
            index = dump_json(self._thumbnail_index(), indent=1)
            write_atomic(self.folder / THUMBNAILS / "index.json", index)
        summary = {
            **made,
            **summarize(rows, self.class_names),
            "speed": dict(speed or {}),
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
        if "thumbnail" in line:
            self._thumbnails[line["video"]] = line["thumbnail"]
        elif "reason" in self._rows.get(line["video"], {"reason": ""}):
            self._rows[line["video"]] = line  # what was bad may be there by now

    def _row(self, video: str, label: int) -> VideoRow:
        line = self._rows[video]
        top: list[int] = line.get("top5", [])
        return VideoRow(
            video=video,
            label=label,
            label_name=self.class_names[label] if label >= 0 else "",
            prediction=top[0] if top else None,
            top5=top,
            top5_names=[self.class_names[number] for number in top],
            top5_scores=line.get("top5_scores", []),
            correct=bool(top) and top[0] == label,
            views=line.get("views", 0),
            frames=line.get("frames", 0),
            decoder=line.get("decoder", ""),
            status="bad" if "reason" in line else "ok",
            reason=str(line.get("reason", line.get("notes", ""))),
        )

    def scores(self) -> NDArray[np.float32]:
        """Scores kept so far [N, C], row n for list entry n; NaN for a bad or missing video."""
        scores = np.full((len(self.entries), len(self.class_names)), np.nan, dtype=np.float32)
        for n, (video, _) in enumerate(self.entries):
            if "scores" in self._rows.get(video, {}):
                scores[n] = np.frombuffer(base64.b64decode(self._rows[video]["scores"]), "<f4")
        return scores

    def _score_file(self, made: Json) -> bytes:
        from safetensors.numpy import save

        data: bytes = save({"scores": self.scores()}, metadata={"kineticlip": json.dumps(made)})
        return data

    def _thumbnail_index(self) -> list[Json]:
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
    (root / THUMBNAILS / "index.json").unlink(missing_ok=True)


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
        path = self.folder / THUMBNAILS / "index.json"
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
    import pyarrow
    from pyarrow import parquet

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
    columns = [field.name for field in fields(VideoRow)]
    try:
        table = parquet.read_table(folder / TABLE, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{folder / TABLE}: cannot be read as Parquet: {problem}") from None
    if missing := set(columns) - set(table.column_names):
        raise UserError(f"{folder / TABLE}: no column '{min(missing)}'")
    rows = [VideoRow(**row) for row in table.to_pylist()]
    if len(rows) != summary.get("videos"):
        raise UserError(f"{folder}: {TABLE} has {len(rows)} rows, {SUMMARY} speaks of another run")
    return Results(folder=folder, summary=summary, rows=rows)


def _parquet(rows: Sequence[VideoRow], made: Json) -> bytes:
    import pyarrow
    from pyarrow import parquet

    text, integer = pyarrow.string(), pyarrow.int64()
    kinds = {
        "video": text,
        "label": integer,
        "label_name": text,
        "prediction": integer,
        "top5": pyarrow.list_(integer),
        "top5_names": pyarrow.list_(text),
        "top5_scores": pyarrow.list_(pyarrow.float32()),
        "correct": pyarrow.bool_(),
        "views": integer,
        "frames": integer,
        "decoder": text,
        "status": text,
        "reason": text,
    }
    schema = pyarrow.schema(list(kinds.items()), metadata={"kineticlip": json.dumps(made)})
    columns = [[getattr(row, name) for row in rows] for name in kinds]
    table = pyarrow.table(
        [pyarrow.array(column, kinds[name]) for name, column in zip(kinds, columns, strict=True)],
        schema=schema,
    )
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


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


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
