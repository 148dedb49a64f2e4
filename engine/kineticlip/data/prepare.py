"""Checking the videos of a data set, and rewriting them for fast reading."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from kineticlip.data.entries import Entry, VideoList
from kineticlip.data.list_writer import list_text
from kineticlip.data.lists import read_list
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic
from kineticlip.video import Probe, ProbeCache, VideoError, open_video
from kineticlip.video.container import choose_stream, open_container
from kineticlip.video.copies import extract_frames, reencode
from kineticlip.video.folder import TEMPLATE
from kineticlip.video.probe import Scan, scan, sequential_decode

SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .flv .wmv .3gp .gif .ogv".split()
)


@dataclass(frozen=True, kw_only=True)
class FoundVideos:
    """What is to be checked: entries, the list file they came from, or the folder.

    text: the lines of the list file, and line: where in it each entry stands, from 1; both empty
    for a folder. classes: names of a folder's subfolders, where every video lies in one. refused:
    videos of a folder whose names no list can hold.
    """

    name: str
    root: str
    entries: tuple[Entry, ...]
    text: tuple[str, ...] = ()
    line: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    refused: tuple[Checked, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One video: its probe, or why it cannot be read (`reason`).

    damaged: pictures the decoder marks as such; -1 where the file was not decoded in full.
    """

    entry: Entry
    probe: Probe | None = None
    reason: str = ""
    damaged: int = -1


def find_videos(source: str | Path, root: str | Path = "") -> FoundVideos:
    """The videos of a list file, or of a folder and its subfolders. Raises UserError."""
    if not Path(source).is_dir():
        listed: VideoList = read_list(source, root)
        text = Path(source).read_text(encoding="utf-8-sig").split("\n")
        return FoundVideos(
            name=str(source),
            root=str(root),
            entries=listed.entries,
            text=tuple(text),
            line=listed.lines,
        )
    found = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(source)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    )
    if not found:
        raise UserError(f"{source}: no video file in this folder")
    names = [path.relative_to(source) for path in found]
    one_deep = all(len(name.parts) == 2 for name in names)
    classes = sorted({name.parts[0] for name in names}) if one_deep else []
    entries, refused = [], []
    for name, path in zip(names, found, strict=True):
        label = classes.index(name.parts[0]) if one_deep else -1
        reason = _why_not_listed(str(name))
        if reason:
            shown = str(name).encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
            refused.append(Checked(entry=Entry(shown, str(path), label), reason=reason))
        else:
            entries.append(Entry(str(name), str(path), label))
    return FoundVideos(
        name=str(source),
        root=str(source),
        entries=tuple(entries),
        classes=tuple(classes),
        refused=tuple(refused),
    )


def _why_not_listed(name: str) -> str:
    """Why a list, which is text with a video a line, cannot name this file; "" where it can."""
    if any(mark in name for mark in '\n\r"'):
        return "its name holds a line break or a quote, so no list can name it; rename it"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8, so no list can name it; rename it"
    return ""


def check(
    entries: Sequence[Entry],
    *,
    workers: int,
    decode: bool = True,
    frame_template: str = TEMPLATE,
    cache: ProbeCache | None = None,
) -> Iterator[Checked]:
    """Checks videos in threads and yields them in order.

    decode: decode every picture, which finds damage and files that end early; else only the packets
    are read and one picture decoded.
    """

    def one(entry: Entry) -> Checked:
        try:
            if os.path.isdir(entry.path):
                return _check_folder(entry, frame_template, decode)
            found = cache.scan(entry.path) if cache is not None else scan(entry.path)
            damaged = _decode_all(found) if decode else -1
        except VideoError as error:
            return Checked(entry=entry, reason=error.reason)
        return Checked(entry=entry, probe=found.probe, damaged=damaged)

    with ThreadPoolExecutor(workers, thread_name_prefix="kineticlip-check") as pool:
        yield from pool.map(one, entries)


def _check_folder(entry: Entry, template: str, decode: bool) -> Checked:
    video = open_video(entry.path, frame_template=template)
    for number in range(video.num_frames if decode else 1):
        video.read([number])
    return Checked(entry=entry, probe=video.probe, damaged=0 if decode else -1)


def _decode_all(found: Scan) -> int:
    """How many pictures of a video are damaged. Raises VideoError where it ends early."""
    if found.pictures is not None:  # decoded already, to be counted
        return sum(bool(frame.is_corrupt) for frame in found.pictures)
    path, promised = found.probe.path, found.probe.num_frames
    count = damaged = 0
    with open_container(path) as container:
        for _, frame in sequential_decode(path, container, choose_stream(container, path)):
            count += 1
            damaged += bool(frame.is_corrupt)
    if count != promised:
        raise VideoError(path, f"promises {promised} frames, of which {count} decode")
    return damaged


def rewrite_videos(
    good: Sequence[Checked],
    folder: Path,
    *,
    frames: bool,
    side: int,
    workers: int,
    frame_template: str = TEMPLATE,
) -> Iterator[Checked]:
    """Rewrites videos into a folder under their own names, in threads; yields them in order.

    frames: as folders of JPEG files, else as MP4. The result's entries are the new videos; one that
    fails keeps its old entry and has a reason. A video listed twice is written once. Errors as
    `copy_targets`.
    """
    targets = copy_targets([item.entry for item in good], frames=frames)
    write = extract_frames if frames else reencode

    def one(path: str) -> int | str:
        try:
            target = folder / targets[path]
            return write(path, target, side=side, frame_template=frame_template)
        except VideoError as error:
            return error.reason

    pool = ThreadPoolExecutor(workers, thread_name_prefix="kineticlip-rewrite")
    try:
        jobs = {path: pool.submit(one, path) for path in targets}
        for item in good:
            written = jobs[item.entry.path].result()
            if isinstance(written, str):
                yield replace(item, reason=written)
                continue
            name = targets[item.entry.path]
            count = written if frames else item.entry.num_frames
            entry = replace(item.entry, name=str(name), path=str(folder / name), num_frames=count)
            yield replace(item, entry=entry)
    finally:  # a full disk or an interrupt ends it here, not after all the others
        pool.shutdown(cancel_futures=True)


def copy_targets(entries: Iterable[Entry], *, frames: bool) -> dict[str, Path]:
    """Path of each video -> where in a folder its copy will be.

    Raises UserError for names that leave the folder or meet in it.
    """
    targets = {entry.path: _target(entry.name, frames) for entry in entries}
    taken: dict[Path, str] = {}
    for path, target in targets.items():
        if taken.setdefault(target, path) != path:
            raise UserError(f"{taken[target]} and {path} would both become {target}")
    return targets


def _target(name: str, frames: bool) -> Path:
    path = Path(name).with_suffix("" if frames else ".mp4")
    path = path.relative_to(path.anchor)
    if ".." in path.parts:
        raise UserError(f"{name}: a name with '..' cannot be written into another folder")
    return path


def without_bad_lines(source: FoundVideos, checked: Sequence[Checked]) -> str:
    """The list file without the lines of unreadable videos; of a folder, a new list.

    checked: of the source's entries, in their order.
    """
    if not source.text:
        return list_text([item.entry for item in checked if not item.reason])
    bad = {line for line, item in zip(source.line, checked, strict=True) if item.reason}
    return "\n".join(text for number, text in enumerate(source.text, 1) if number not in bad)


def copies_list(entries: Sequence[Entry]) -> str:
    """The list of rewritten videos. Raises UserError for entries that are more than a video."""
    for entry in entries:
        if entry.labels or entry.length >= 0:
            raise UserError(
                f"{entry.name}: several labels and stretches do not fit the list of copies; "
                "rewrite the folder of videos instead of its list"
            )
    return list_text(entries)


def bad_list(checked: Sequence[Checked]) -> str:
    """Lines `path<tab>reason` of the unreadable videos."""
    return "".join(f"{item.entry.name}\t{item.reason}\n" for item in checked if item.reason)


def summarise(checked: Sequence[Checked]) -> dict[str, object]:
    """Counts over all videos, plain data."""
    probes = [item.probe for item in checked if item.probe is not None and not item.reason]
    frames = sorted(probe.num_frames for probe in probes)
    kinds = Counter(
        f"{probe.codec} {probe.pixel_format} in {probe.container.split(',')[0]}" for probe in probes
    )
    sizes = Counter(f"{probe.width}x{probe.height}" for probe in probes)
    return {
        "videos": len(checked),
        "readable": len(probes),
        "unreadable": sum(bool(item.reason) for item in checked),
        "damaged": sum(item.damaged > 0 for item in checked),
        "kinds": dict(kinds.most_common()),
        "sizes": dict(sizes.most_common(8)),
        "frames": [frames[0], frames[len(frames) // 2], frames[-1]] if frames else [],
        "variable_rate": sum(probe.variable_rate for probe in probes),
        "turned": sum(probe.rotation != 0 or probe.mirrored for probe in probes),
        "read_in_sequence": sum(bool(probe.why_in_sequence) for probe in probes),
        "time_stamps_out_of_order": sum(not probe.in_time_order for probe in probes),
    }


def write_text(path: str | Path, text: str) -> None:
    """Replaces a text file as a whole. Raises UserError."""
    write_atomic(Path(path), text.encode())
