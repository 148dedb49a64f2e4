"""`kineticlip frames FILE`: what a video is, and chosen frames of it, by number."""

from __future__ import annotations

import argparse
import dataclasses
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_whole

if TYPE_CHECKING:
    from kineticlip.video import VideoSource

PORTION_BYTES = 1 << 28  # decoded frames held at a time
FILE_SUFFIXES = (".npy", ".png", ".jpg", ".jpeg", ".gif", ".mp4", ".txt", ".json")  # no folder's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a video, or a folder of numbered images")
    parser.add_argument(
        "--at", metavar="N,N,...", help="frame numbers from 0 in display order; A-B is a range"
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="FILE.npz (uint8 `frames` [n, H, W, 3] and `numbers`), or a new folder for PNG files",
    )
    parser.add_argument(
        "--decoder", default="auto", choices=("auto", "torchcodec", "pyav"), help="default: auto"
    )
    parser.add_argument(
        "--frame-template",
        default="img_{:05d}.jpg",
        metavar="NAME",
        help="file names of a folder's images",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from kineticlip.video import open_video

    if (args.at is None) != (args.out is None):
        raise UserError("--at and --out go together: which frames, and where to")
    source = open_video(args.file, decoder=args.decoder, frame_template=args.frame_template)
    numbers = _numbers(args.at, source) if args.at is not None else []
    if args.out is not None:
        if not Path(args.out).absolute().parent.is_dir():
            raise UserError(f"--out: {args.out} cannot be written: no such folder")
        write = _write_npz if args.out.endswith(".npz") else _write_folder
        write(source, numbers, Path(args.out))
    facts = dataclasses.asdict(source.probe)
    facts |= {"decoder": source.decoder, "notes": source.notes, "out": args.out, "at": numbers}
    print(json.dumps(facts) if args.json else _summary(source, args.out, len(numbers)))
    return 0


def _numbers(text: str, source: VideoSource) -> list[int]:
    numbers: list[int] = []
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"--at: expected frame numbers like 0,10,20-29, got {word.strip()!r}")
        if int(last) >= source.num_frames:
            raise UserError(
                f"--at: {source.path} has no frame {last}; it has {source.num_frames}, "
                f"numbered 0 to {source.num_frames - 1}"
            )
        numbers.extend(range(int(first), int(last) + 1))
    return numbers


def _summary(source: VideoSource, out: str | None, written: int) -> str:
    facts = source.probe
    turned = f", turned by {facts.rotation} degrees" if facts.rotation else ""
    rate = "variable rate, " if facts.variable_rate else ""
    lines = [
        f"{source.path}: {facts.num_frames} frames of {facts.width} x {facts.height}{turned}",
        f"  {facts.codec} {facts.pixel_format} ({facts.color_matrix}) in {facts.container}, {rate}"
        f"{facts.frame_rate:g} frames/s, {facts.duration:g} s, {facts.keyframes} key frames",
        f"  counted by {facts.counted}, read by {source.decoder}",
        *(f"  {note}" for note in source.notes),
    ]
    if out is not None:
        lines.append(f"{written} frames -> {out}")
    return "\n".join(lines)


def _portions(source: VideoSource, numbers: list[int]) -> Iterator[tuple[list[int], Any]]:
    """(numbers, frames [n, H, W, 3]) in runs of bounded size."""
    step = max(1, PORTION_BYTES // (3 * source.width * source.height))
    for start in range(0, len(numbers), step):
        some = numbers[start : start + step]
        yield some, source.read(some)


def _write_npz(source: VideoSource, numbers: list[int], path: Path) -> None:
    """The same file as numpy.savez would write, without holding all frames at once."""
    import numpy as np
    from numpy.lib import format as npy

    shape = (len(numbers), source.height, source.width, 3)
    with write_whole(path) as part:
        with zipfile.ZipFile(part, "w") as archive:
            with archive.open("frames.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(file, header)
                for _, frames in _portions(source, numbers):
                    file.write(memoryview(frames).cast("B"))
            with archive.open("numbers.npy", "w") as file:
                npy.write_array(file, np.array(numbers, dtype=np.int64))


def _write_folder(source: VideoSource, numbers: list[int], path: Path) -> None:
    from PIL import Image

    if path.exists():
        raise UserError(f"--out: {path} exists already; name a new folder")
    if path.suffix.lower() in FILE_SUFFIXES:
        raise UserError(f"--out: {path} would be a folder; name one, or FILE.npz")
    with write_whole(path) as part:
        part.mkdir()
        for some, frames in _portions(source, numbers):
            for number, frame in zip(some, frames, strict=True):
                Image.fromarray(frame).save(part / f"frame_{number:06d}.png")
