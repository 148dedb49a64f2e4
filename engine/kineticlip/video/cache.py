"""Probes kept beside a data set, so that opening its videos again costs no pass over them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from kineticlip.errors import UserError
from kineticlip.video.container import check_regular_file
from kineticlip.video.probe import Probe, Scan, scan

FIELDS = tuple(field.name for field in dataclasses.fields(Probe) if field.name != "path")
# Lines of a program whose Probe has other fields are passed over.
VERSION = hashlib.sha256(" ".join(FIELDS).encode()).hexdigest()[:8]
Key = tuple[str, int, int]  # path relative to the cache's folder, bytes, time of change in ns


class ProbeCache:
    """Probes by path, size and time of change, in one file of JSON lines.

    Threads and processes may share the file: a probe is appended as one whole line by one write
    with O_APPEND; lines that do not parse are passed over. Unreadable videos are not remembered.
    Raises UserError where the file cannot be read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            self._probes = _load(self.path)
        except OSError as error:
            raise UserError(f"{path}: cannot be used as probe cache: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self._probes)

    def __enter__(self) -> ProbeCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; the cache is not used afterwards."""
        os.close(self._descriptor)

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
        values = [getattr(found.probe, name) for name in FIELDS]
        line = json.dumps([VERSION, *key, *values], separators=(",", ":")) + "\n"
        with self._lock:
            os.write(self._descriptor, line.encode())
            self._probes[key] = found.probe
        return found


def _load(path: Path) -> dict[Key, Probe]:
    probes: dict[Key, Probe] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row: Any = json.loads(line)
            except ValueError:  # cut short when a writer was killed
                continue
            if isinstance(row, list) and len(row) == len(FIELDS) + 4 and row[0] == VERSION:
                name, size, changed, *values = row[1:]
                probes[name, size, changed] = Probe(
                    path=name, **dict(zip(FIELDS, values, strict=True))
                )
    return probes
