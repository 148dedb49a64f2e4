"""Parts of one evaluation: each a results folder, parts/<n>, that a process fills by itself.

The parent takes the parts' journals over into the main one, also those that an earlier, killed
run left behind.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from kineticlip.evaluation.lines import is_picture, is_scored
from kineticlip.evaluation.results import JOURNAL, THUMBNAILS, remove_results
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.journal import Journal, Json, first_difference, read_journal

PARTS, LOCK = "parts", "lock.jsonl"
PATIENCE = 10.0  # seconds that processes of a killed parent may take to follow it
POLL_SECONDS = 0.2


def part_folder(out: Path, number: int) -> Path:
    return out / PARTS / str(number)


@contextmanager
def parts_locked(out: Path) -> Iterator[None]:
    """Keeps other processes from working on the parts. UserError where one does already."""
    with closing(Journal(out / PARTS / LOCK, {"format": 1})):
        yield


def finished_videos(out: Path) -> set[str]:
    """Names with scores in the main journal; bad ones are tried again."""
    return {line["video"] for line in _journal_of(out)[1:] if is_scored(line)}


def check_same_run(out: Path, part: Path) -> None:
    """Raises UserError where the main journal belongs to another run than this part of it."""
    main = _journal_of(out)
    difference = first_difference(main[0], read_journal(part / JOURNAL)[0]) if main else None
    if difference:
        raise UserError(
            f"{out / JOURNAL}: belongs to another run: {difference}; "
            "choose another folder, or delete this one (--fresh)"
        )


def remove_run(out: Path) -> None:
    """Deletes the results in a folder, finished or not, so that it starts afresh."""
    remove_results(out)
    shutil.rmtree(out / PARTS, ignore_errors=True)


def take_over_parts(out: Path) -> None:
    """Merges what a killed run by several processes left. UserError where it still runs."""
    if (out / PARTS).is_dir():
        with parts_locked(out):
            merge_parts(out)


def merge_parts(out: Path) -> int:
    """Takes the rows and pictures of all parts into the main folder and removes the parts.

    Gives the number of rows taken. Raises UserError where a part belongs to another run, and
    where the process that writes it does not end.
    """
    taken = 0
    for part in sorted((out / PARTS).glob("[0-9]*")):
        if _journal_begun(part):
            taken += _merge(out, part)
        for picture in (part / THUMBNAILS).glob("*.jpg"):
            (out / THUMBNAILS).mkdir(exist_ok=True)
            picture.replace(out / THUMBNAILS / picture.name)
        shutil.rmtree(part)
    return taken


def _merge(out: Path, part: Path) -> int:
    header = read_journal(part / JOURNAL)[0]
    with ExitStack() as stack:
        source = stack.enter_context(closing(_patiently(part / JOURNAL, header)))
        target = stack.enter_context(closing(Journal(out / JOURNAL, header)))
        known = {_kind(row) for row in target.rows}
        fresh = [row for row in source.rows if _kind(row) not in known]
        for row in fresh:
            target.append(row)
    return len(fresh)


def _kind(line: Json) -> tuple[str, str]:
    """A video's scores, its picture, or one reason why it was bad."""
    return line["video"], str(line.get("reason", is_picture(line)))


def _journal_begun(folder: Path) -> bool:
    path = folder / JOURNAL
    return path.exists() and path.stat().st_size > 0


def _journal_of(folder: Path) -> list[Json]:
    """The lines of a folder's journal, its header first; none where it has not begun."""
    return read_journal(folder / JOURNAL) if _journal_begun(folder) else []


def _patiently(path: Path, header: Json) -> Journal:
    """The journal, once the process that holds it has followed its parent."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return Journal(path, header)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)
