"""Decoding speed: clips made here, every decoder of this machine, frames checked by their number.

    python bench/decode.py --results bench/results
    python bench/decode.py --device cuda --sizes 340x256,1280x720,1920x1080

Each row reads 8 or 32 frames, spread over 300, of several videos at once. The baseline reads a
video from its first frame to the last one wanted and converts what it keeps, as loaders on PyAV do.
`cpu_ratio` is its process CPU time over the decoder's, `ratio` the same of wall time: medians over
rounds that alternate. "whole" feeds a GPU the whole stream, "trimmed" the packets that the frames
need.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from kernel_results import keep
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.machine import machine_record, software_record
from kineticlip.video import open_video, torchcodec
from kineticlip.video.container import Unsuitable
from kineticlip.video.stream_decoders import make_stream_decoder
from kineticlip.video.trim import Trimmed, trim

FRAMES = 300
BITS, CELL = 9, 16
GROUPS = (250, 12)  # frames from one key frame to the next: x264's habit, and made for seeking
COUNTS = (8, 32)  # frames read of a video
BASELINE = "sequential"
Run = Callable[[], list[Any]]


def texture(height: int, width: int) -> NDArray[np.uint8]:
    """A smooth random picture, larger than the frame, to pan over: uint8 [H, W, 3]."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3))
    for step in (64, 16, 4):
        coarse = rng.normal(size=(height // step + 2, width // step + 2, 3))
        image += np.repeat(np.repeat(coarse, step, 0), step, 1)[:height, :width] * step**0.5
    image -= image.min()
    scaled: NDArray[np.uint8] = (image * (255 / image.max())).astype(np.uint8)
    return scaled


def write_clip(path: Path, width: int, height: int, group: int) -> None:
    """300 frames of H.264 (medium, crf 23): a pan with light noise, the number as a barcode."""
    background = texture(height + FRAMES, width + FRAMES)
    rng = np.random.default_rng(1)
    noise = rng.integers(-4, 5, size=(8, height, width, 1), dtype=np.int16)
    with av.open(str(path), "w") as container:
        options = {"preset": "medium", "crf": "23", "g": str(group), "keyint_min": str(group)}
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(FRAMES):
            top, left = number // 2, number
            image = background[top : top + height, left : left + width] + noise[number % 8]
            image = image.clip(0, 255).astype(np.uint8)
            for bit in range(BITS):
                image[:CELL, bit * CELL : (bit + 1) * CELL] = 235 if number >> bit & 1 else 20
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def number_of(frame: NDArray[np.uint8]) -> int:
    """The barcode of a frame."""
    cells = frame[4 : CELL - 4, : BITS * CELL].reshape(CELL - 8, BITS, CELL, 3)[:, :, 4:-4]
    return int(((cells.mean(axis=(0, 2, 3)) > 128) << np.arange(BITS)).sum())


def sequential(path: Path, numbers: list[int]) -> list[NDArray[np.uint8]]:
    """What the decoders are compared with: all up to the last frame, the wanted ones kept."""
    wanted, found = set(numbers), []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found.append(frame.to_ndarray(format="rgb24"))
            if number == max(numbers):
                break
    return found


def missing_torchcodec() -> str:
    """Why torchcodec cannot decode here; "" where it can."""
    try:
        torchcodec.load()
    except Unsuitable as error:
        return str(error)
    return ""


def runs(
    path: Path, numbers: list[int], options: argparse.Namespace, open_decoders: ExitStack
) -> Iterator[tuple[str, Run | str]]:
    """(name, run) of every decoder; a run reads `videos` videos and returns their frames.

    Where a decoder cannot be had, why not.
    """
    every = [path] * options.videos

    def on_cpu(decoder: str, source: Path) -> NDArray[np.uint8]:
        return open_video(source, decoder=decoder).read(numbers)

    def pooled(read: Callable[[Path], Any]) -> list[Any]:
        with ThreadPoolExecutor(options.threads) as pool:
            return list(pool.map(read, every))

    yield BASELINE, partial(pooled, partial(sequential, numbers=numbers))
    yield "pyav cpu", partial(pooled, partial(on_cpu, "pyav"))
    yield "torchcodec cpu", missing_torchcodec() or partial(pooled, partial(on_cpu, "torchcodec"))
    if not options.device.startswith("cuda"):
        return
    cut = partial(trim, shown=open_video(path).probe.stored_size)  # as the batch reader trims
    whole = replace(cut(path, range(FRAMES)), positions=tuple(numbers))
    for name in ("dali", "torchcodec"):
        try:
            decoder, _ = make_stream_decoder(
                name, device=options.device, batch=options.batch, num_threads=options.threads
            )
        except UserError as error:
            yield f"{name} gpu", str(error)
            continue
        assert decoder is not None
        open_decoders.callback(decoder.close)

        def streamed(stream: Trimmed | None, decoder: Any = decoder) -> list[Any]:
            if stream is not None:
                return list(decoder.decode([stream] * options.videos))
            with ThreadPoolExecutor(options.threads) as pool:
                return list(decoder.decode(list(pool.map(partial(cut, numbers=numbers), every))))

        yield f"{name} gpu, whole", partial(streamed, whole)
        yield f"{name} gpu, trimmed", partial(streamed, None)


def wrong_frames(run: Run, numbers: list[int]) -> str | None:
    """What a decoder returned instead of the frames asked for, or how it failed."""
    try:
        videos = run()
    except (RuntimeError, UserError) as error:  # a driver without NVDEC, say
        return str(error).strip().splitlines()[0]
    for frames in videos:
        found = [
            number_of(np.asarray(frame.cpu() if hasattr(frame, "cpu") else frame))
            for frame in frames
        ]
        if found != numbers:
            return f"returned frames {found}, not {numbers}"
    return None


def timed(run: Run, device: str) -> tuple[float, float]:
    """Wall and process CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.startswith("cuda") and torch.cuda.is_available():
        torch.cuda.synchronize(device)  # torchcodec returns before the frames are there
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(path: Path, numbers: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every decoder, in rounds that alternate."""
    wrong: dict[str, str] = {}
    spans: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as open_decoders:
        every = dict(runs(path, numbers, options, open_decoders))
        right: dict[str, Run] = {}
        for name, run in every.items():
            problem = run if isinstance(run, str) else wrong_frames(run, numbers)
            if isinstance(run, str) or problem is not None:
                wrong[name] = str(problem)
            else:
                right[name] = run
                spans[name] = []
        for _ in range(options.rounds):
            for name, run in right.items():
                spans[name].append(timed(run, options.device))
    rows = []
    for name in every:
        if name in wrong:
            rows.append({"decoder": name, "error": wrong[name]})
            continue
        row: dict[str, Any] = {"decoder": name}
        for place, kind in enumerate(("ratio", "cpu_ratio")):
            pairs = zip(spans[BASELINE], spans[name], strict=True)
            ratios = [before[place] / after[place] for before, after in pairs]
            row[kind] = round(median(ratios), 2)
            row[f"{kind}_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
        if options.device.startswith("cuda"):  # absolute speeds are for GPUs
            row["videos_per_s"] = round(options.videos / median(s for s, _ in spans[name]), 1)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'size':<10} {'group':>5} {'frames':>6}  {'decoder':<22} ratio  CPU ratio (range)"]
    for row in rows:
        start = f"{row['size']:<10} {row['group']:>5} {row['frames']:>6}  {row['decoder']:<22}"
        if "error" in row:
            lines.append(f"{start} {row['error']}")
            continue
        low, high = row["cpu_ratio_range"]
        speed = f"  {row['videos_per_s']} videos/s" if "videos_per_s" in row else ""
        numbers = f"{row['ratio']:5.2f}  {row['cpu_ratio']:9.2f} ({low:.2f}-{high:.2f})"
        lines.append(f"{start} {numbers}{speed}")
    return "\n".join(lines)


def sizes(text: str) -> list[tuple[int, int]]:
    """`340x256,1280x720` -> pairs; argparse names a ValueError."""
    pairs = [tuple(map(int, size.split("x"))) for size in text.split(",")]
    return [(width, height) for width, height in pairs]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for NVDEC as well (cpu)")
    parser.add_argument(
        "--sizes", type=sizes, default="340x256,1280x720", help="WxH,... (340x256,1280x720)"
    )
    parser.add_argument("--threads", type=int, default=2, help="videos decoded at a time (2)")
    parser.add_argument("--batch", type=int, default=16, help="videos of a GPU's batch (16)")
    parser.add_argument("--videos", type=int, default=8, help="videos in a run (8)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all decoders in turn (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep the document there")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    software = software_record()  # before it can change while this runs
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for width, height in options.sizes:
            size = f"{width}x{height}"
            for group in GROUPS:
                path = Path(folder, f"{size}-{group}.mp4")
                write_clip(path, width, height, group)
                for count in COUNTS:
                    numbers = [int((k + 0.5) * FRAMES / count) for k in range(count)]
                    where = {"size": size, "group": group, "frames": count}
                    rows += [where | row for row in measure(path, numbers, options)]
    shown = ("device", "threads", "batch", "videos", "rounds")
    record = {
        "kind": "decode",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine_record(),
        "software": software,
        "settings": {name: getattr(options, name) for name in shown},
        "rows": rows,
    }
    print(json.dumps(record, indent=1) if options.json else table(rows))
    if options.results is not None:
        print(f"written: {keep(options.results, record, 'decode')}", file=sys.stderr)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
