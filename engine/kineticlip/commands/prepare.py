"""`kineticlip prepare SOURCE`: which videos can be read, what they are, and smaller copies."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kineticlip.runtime.errors import UserError

if TYPE_CHECKING:
    from kineticlip.data.prepare import Checked, FoundVideos

T = TypeVar("T")
SHOWN = 20  # unreadable videos printed; all of them go to --bad and --json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"{parser.epilog}\n\nExits with status 1 if any video cannot be read."
    parser.add_argument("source", metavar="SOURCE", help="a list of videos, or a folder of them")
    parser.add_argument(
        "--root", default="", metavar="DIR", help="folder that the paths are relative to"
    )
    parser.add_argument("--good", metavar="FILE", help="write a list of the readable videos")
    parser.add_argument("--bad", metavar="FILE", help="write the unreadable videos and why")
    parser.add_argument("--classes", metavar="FILE", help="write the folder's class names in order")
    parser.add_argument(
        "--quick", action="store_true", help="read packets and decode one frame only"
    )
    parser.add_argument(
        "--reencode",
        metavar="DIR",
        help="write H.264 copies with short GOPs, which decode faster; --good lists the copies",
    )
    parser.add_argument(
        "--frames", metavar="DIR", help="write folders of JPEG frames; --good lists them"
    )
    parser.add_argument(
        "--side",
        type=int,
        default=336,
        metavar="N",
        help="short side of the copies (336); 0 keeps the size",
    )
    parser.add_argument(
        "--cache",
        default="auto",
        metavar="FILE",
        help="cache what was found for later runs; auto: beside the videos, off: no cache",
    )
    parser.add_argument(
        "--frame-template",
        default="img_{:05d}.jpg",
        metavar="NAME",
        help="file names in image folders",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="default: one per core")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from kineticlip.data import prepare

    _check_arguments(args)
    workers = args.workers or os.cpu_count() or 1
    folder = args.reencode or args.frames
    source = prepare.find_videos(args.source, args.root)
    # What cannot be written is said before hours of decoding.
    if args.classes is not None and not source.classes:
        raise UserError(f"--classes: not every video of {args.source} is in a class's folder")
    if folder is not None:
        prepare.copy_targets(source.entries, frames=bool(args.frames))
    with _cache(args, source) as cache:
        results = prepare.check(
            source.entries,
            workers=workers,
            decode=not args.quick and folder is None,  # rewriting decodes it all anyway
            frame_template=args.frame_template,
            cache=cache,
        )
        checked = list(_progress(results, len(source.entries), "checked"))
    if folder is not None:
        good = [item for item in checked if not item.reason]
        made = prepare.rewrite_videos(
            good,
            Path(folder),
            frames=bool(args.frames),
            side=args.side,
            workers=workers,
            frame_template=args.frame_template,
        )
        rewritten = iter(list(_progress(made, len(good), "written")))
        checked = [item if item.reason else next(rewritten) for item in checked]
    _write_lists(args, source, checked, folder is not None)
    checked.extend(source.refused)
    summary = prepare.summarise(checked)
    if args.json:
        print(json.dumps({**summary, "items": _rows(checked)}))
    else:
        print(_table(summary, checked))
        if folder is not None:
            print(f"{summary['readable']} copies in {folder}")
    return 1 if summary["unreadable"] else 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.reencode is not None and args.frames is not None:
        raise UserError("--reencode and --frames: choose one")
    if args.side < 0 or args.side % 2:
        raise UserError(f"--side: expected an even number of pixels, or 0, got {args.side}")
    if args.workers < 0:
        raise UserError(f"--workers: expected 1 or more, got {args.workers}")
    folder = args.reencode or args.frames
    if folder is not None and Path(args.source).is_dir():
        inside = Path(folder).resolve()
        if Path(args.source).resolve() in (inside, *inside.parents):
            raise UserError(f"{folder}: lies in {args.source}; copies go to another place")
    if args.classes is not None and not Path(args.source).is_dir():
        raise UserError("--classes: only a folder with one subfolder a class has class names")


def _cache(args: argparse.Namespace, source: FoundVideos) -> contextlib.AbstractContextManager[Any]:
    from kineticlip.video.cache import ProbeCache, cache_path

    path = cache_path(args.cache, root=source.root, listed=source.name)
    return ProbeCache(path) if path is not None else contextlib.nullcontext()


def _progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    from tqdm import tqdm

    bar = tqdm(items, total=total, desc=what, unit="video", file=sys.stderr, disable=None)
    yield from bar


def _write_lists(
    args: argparse.Namespace, source: FoundVideos, checked: list[Checked], rewritten: bool
) -> None:
    from kineticlip.data import prepare

    if args.classes is not None:
        prepare.write_text(args.classes, "".join(f"{name}\n" for name in source.classes))
    if args.good is not None:
        if rewritten:
            text = prepare.copies_list([item.entry for item in checked if not item.reason])
        else:
            text = prepare.without_bad_lines(source, checked)
        prepare.write_text(args.good, text)
    if args.bad is not None:
        prepare.write_text(args.bad, prepare.bad_list([*checked, *source.refused]))


def _rows(checked: list[Checked]) -> list[dict[str, Any]]:
    return [
        {
            "name": item.entry.name,
            "label": item.entry.label,
            "reason": item.reason,
            "damaged": item.damaged,
            "probe": dataclasses.asdict(item.probe) if item.probe is not None else None,
        }
        for item in checked
    ]


def _table(summary: dict[str, Any], checked: list[Checked]) -> str:
    lines = [f"{summary['videos']} videos, {summary['unreadable']} unreadable"]
    lines += [f"  {count:>8}  {kind}" for kind, count in summary["kinds"].items()]
    sizes = ", ".join(f"{size} ({count})" for size, count in summary["sizes"].items())
    frames = summary["frames"]
    if frames:
        lines.append(f"sizes: {sizes}")
        lines.append(f"frames: {frames[0]} to {frames[2]}, half have {frames[1]} or more")
    for key in (
        "variable_rate",
        "turned",
        "read_in_sequence",
        "time_stamps_out_of_order",
        "damaged",
    ):
        if summary[key]:
            lines.append(f"{key.replace('_', ' ')}: {summary[key]}")
    bad = [f"  {item.entry.name}: {item.reason}" for item in checked if item.reason]
    if bad:
        lines += ["unreadable:", *bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  and {len(bad) - SHOWN} more (--bad FILE lists all)")
    return "\n".join(lines)
