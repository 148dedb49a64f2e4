"""Probes kept beside a data set, so that opening its videos again costs no pass over them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, get_args, get_type_hints

from kineticlip.runtime.errors import UserError
from kineticlip.video.container import MAX_PIXELS, check_regular_file
from kineticlip.video.probe import TURNS, Probe, Scan, scan

NAME = ".kineticlip-probes.jsonl"  # in the folder of the videos, where no other file is named
KINDS = {name: kind for name, kind in get_type_hints(Probe).items() if name != "path"}
# Lines of a program whose Probe has other fields are passed over.
VERSION = hashlib.sha256(" ".join(KINDS).encode()).hexdigest()[:8]
Key = tuple[str, int, int]  # path relative to the cache's folder, bytes, time of change in ns

log = logging.getLogger(__name__)


def cache_path(setting: str, *, root: str, listed: str) -> Path | None:
    """The file that a setting names; None for "off".

    "auto" is the folder of the videos, `root`, or without one that of the list; None where there
    is neither, or it does not exist.
    """
    if setting in ("", "off"):
        return None
    if setting != "auto":
        return Path(setting)
    folder = root or (os.path.dirname(os.path.abspath(listed)) if listed else "")
    return Path(folder, NAME) if os.path.isdir(folder) else None


class ProbeCache:
    """Probes by path, size and time of change, in one file of JSON lines.

    Threads and processes may share the file: a probe is appended as one whole line by one write
    with O_APPEND; lines that do not parse are passed over. Unreadable videos are not remembered.
    Where the file cannot be written (a read-only data set, a full disk) one warning says so, and
    probes last as long as the process. Raises UserError where the path cannot be a file at all.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._writes = True
        if not self.path.parent.is_dir():
            raise UserError(f"{path}: cannot be used as probe cache: its folder does not exist")
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{path}: cannot be used as probe cache: not a regular file")
        try:
            self._probes = _load(self.path)
        except FileNotFoundError:
            self._probes = {}
        except OSError as error:
            raise UserError(f"{path}: cannot be used as probe cache: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self._probes)

    def __enter__(self) -> ProbeCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what is learnt afterwards is not written."""
        with self._lock:
            self._stop()

    def scan(self, path: str | Path) -> Scan:
        """The stored probe of an unchanged file (without packet table), or a fresh scan, stored."""
        status = check_regular_file(path)
        key = (
            os.path.relpath(path, self.path.parent),
            status.st_size,
            status.st_mtime_ns,
        )
        known = self._probes.get(key)
        if known is not None:
            return Scan(probe=dataclasses.replace(known, path=str(path)))
        found = scan(path)
        values = [getattr(found.probe, name) for name in KINDS]
        line = json.dumps([VERSION, *key, *values], separators=(",", ":")) + "\n"
        with self._lock:
            if key not in self._probes:  # another thread may have met the same file
                self._append(line.encode())
                self._probes[key] = found.probe
        return found

    def _append(self, line: bytes) -> None:
        """Writes a line, the first one creating the file; gives up at the first that fails."""
        if not self._writes:
            return
        try:
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._descriptor = os.open(self.path, flags, 0o666)
            written = os.write(self._descriptor, line)
            reason = "the disk is full" if written < len(line) else ""
        except OSError as error:
            reason = str(error.strerror)
        if reason:
            log.warning("%s: probes are not kept: %s", self.path, reason)
            self._stop()

    def _stop(self) -> None:
        self._writes = False
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _load(path: Path) -> dict[Key, Probe]:
    probes: dict[Key, Probe] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row: Any = json.loads(line)
            except (ValueError, RecursionError):  # cut short when a writer was killed
                continue
            if not isinstance(row, list) or len(row) != len(KINDS) + 4 or row[0] != VERSION:
                continue
            name, size, changed, *values = row[1:]
            fields = dict(zip(KINDS, values, strict=True))
            known = _fits(name, str) and _fits(size, int) and _fits(changed, int)
            if known and _believable(fields):
                probes[name, size, changed] = Probe(path=name, **fields)
    return probes


def _believable(fields: dict[str, Any]) -> bool:
    """Whether the fields of a probe have their types, and values that a file can have."""
    return (
        all(_fits(value, KINDS[name]) for name, value in fields.items())
        and (fields["rotation"], fields["mirrored"]) in TURNS
        and min(fields["width"], fields["height"], fields["num_frames"]) > 0
        and fields["width"] * fields["height"] <= MAX_PIXELS
    )


def _fits(value: Any, kind: Any) -> bool:
    if get_args(kind):  # a Literal
        return value in get_args(kind)
    return type(value) is kind
