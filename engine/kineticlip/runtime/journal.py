"""An append-only file of JSON lines that outlives a killed process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kineticlip.runtime.errors import UserError

Json = dict[str, Any]


class Journal:
    """Opens or continues a journal; `rows` are the lines found after the header.

    The first line is `header`. Every line is handed to the system at once, so a killed process
    loses nothing; it reaches the disk every `sync_seconds`, so a power cut loses that much. What
    follows the last whole line is cut off (`dropped_bytes`). One process at a time may hold it.

    Raises UserError when the file cannot be written, when another process holds it, and when its
    header differs from `header`, naming the first difference.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, sync_seconds: float = 5.0) -> None:
        self.path = path
        self.sync_seconds = sync_seconds
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        self._synced = time.monotonic()
        try:
            self._lock()
            self.rows, self.dropped_bytes = self._continue(header)
        except BaseException:
            self._file.close()
            raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one line. Raises UserError when it does not fit on the disk."""
        self._write(row)
        if time.monotonic() - self._synced >= self.sync_seconds:
            self.sync()

    def sync(self) -> None:
        """Returns once every line is on the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs, and lets another process go on with the file; closing twice is fine."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(f"{self.path}: another process is writing to it") from None
            warnings.warn(
                f"{self.path}: no file locks here ({error.strerror}); a second process writing "
                "to it would go unnoticed",
                stacklevel=4,
            )

    def _continue(self, header: Mapping[str, Any]) -> tuple[list[Json], int]:
        self._file.seek(0)
        found = self._file.read()
        lines, length = _whole_lines(found)
        self._file.truncate(length)
        if not lines:
            self._write(header)
            return [], len(found)
        difference = first_difference(lines[0], json.loads(json.dumps(header)))
        if difference:
            raise UserError(
                f"{self.path}: belongs to another run: {difference}; "
                "choose another folder, or delete this one (--fresh)"
            )
        return lines[1:], len(found) - length

    def _write(self, row: Mapping[str, Any]) -> None:
        line = memoryview(dump_json(row))
        try:
            while line:  # a full disk takes part of a line, then raises
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None


def read_journal(path: Path) -> list[Json]:
    """Header and whole lines of a journal that another process may be writing.

    Raises UserError where there is none.
    """
    try:
        lines = _whole_lines(path.read_bytes())[0]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not lines:
        raise UserError(f"{path}: is empty, or no journal")
    return lines


def dump_json(value: object, *, indent: int | None = None) -> bytes:
    """JSON in ASCII with a closing newline; NaN, which is not JSON, is a ValueError."""
    return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode("ascii")


def _whole_lines(data: bytes) -> tuple[list[Json], int]:
    """The JSON objects of all lines before the first one that is torn, and where they end."""
    lines: list[Json] = []
    length = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError:  # a power cut may leave zeros
            break
        if not isinstance(row, dict):
            break
        lines.append(row)
        length += len(line)
    return lines, length


def first_difference(there: object, here: object, where: str = "") -> str:
    """`key.subkey is 1 there and 3 here`, or nothing when both are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            difference = first_difference(there.get(key), here.get(key), f"{where}.{key}")
            if difference:
                return difference
        return ""
    if there == here:
        return ""
    return f"{where.lstrip('.')} is {_brief(there)} there and {_brief(here)} here"


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."
