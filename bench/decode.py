"""Decoding speed: clips made here, every decoder of this machine, frames checked by their barcode.

    python bench/decode.py --json bench/results/decode.json
    python bench/decode.py --device cuda --sizes 340x256,1280x720,1920x1080

Each row reads 8 or 32 frames, spread over 300, of many videos at once. `cpu_ms` is process CPU time
a video, `videos_per_s` counts wall time. "whole" feeds the whole stream, "trimmed" the packets that
the frames need.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from kineticlip.measure import machine_record, software_record
from kineticlip.video import open_video
from kineticlip.video.batch import make_stream_decoder
from kineticlip.video.trim import Trimmed, trim

FRAMES = 300
BITS, CELL = 9, 16
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


def runs(path: Path, numbers: list[int], options: argparse.Namespace) -> Iterator[tuple[str, Run]]:
    """(name, run) of every decoder; a run reads `videos` videos and returns their frames."""
    every = [path] * options.videos

    def on_cpu(decoder: str, source: Path) -> NDArray[np.uint8]:
        return open_video(source, decoder=decoder).read(numbers)

    def pooled(decoder: str) -> list[Any]:
        with ThreadPoolExecutor(options.threads) as pool:
            return list(pool.map(partial(on_cpu, decoder), every))

    yield "pyav cpu", partial(pooled, "pyav")
    yield "torchcodec cpu", partial(pooled, "torchcodec")
    if not options.device.startswith("cuda"):
        return
    whole = trim(path, range(FRAMES))
    whole = Trimmed(data=whole.data, positions=tuple(numbers), pictures=FRAMES)
    for name in ("dali", "torchcodec"):
        decoder, _ = make_stream_decoder(
            name, device=options.device, batch=options.batch, num_threads=options.threads
        )
        assert decoder is not None

        def streamed(stream: Trimmed | None, decoder: Any = decoder) -> list[Any]:
            if stream is not None:
                return list(decoder.decode([stream] * options.videos))
            with ThreadPoolExecutor(options.threads) as pool:
                return list(decoder.decode(list(pool.map(partial(trim, numbers=numbers), every))))

        yield f"{name} gpu, whole", partial(streamed, whole)
        yield f"{name} gpu, trimmed", partial(streamed, None)
        decoder.close()


def measure(run: Run, numbers: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """One row; fails where a decoder returns other frames than asked for."""
    frames = run()[0]
    found = [
        number_of(np.asarray(frame.cpu() if hasattr(frame, "cpu") else frame)) for frame in frames
    ]
    if found != numbers:
        return {"error": f"returned frames {found}, not {numbers}"}
    walls, cpus = [], []
    for _ in range(options.repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if options.device.startswith("cuda"):
            torch.cuda.synchronize(options.device)  # torchcodec returns before the frames are there
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "videos_per_s": round(options.videos / min(walls), 1),
        "cpu_ms": round(1000 * float(np.median(cpus)) / options.videos, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default="340x256,1280x720")
    parser.add_argument("--threads", type=int, default=2, help="videos decoded at the same time")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--videos", type=int, default=8, help="videos in a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write rows, machine and software")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            width, height = map(int, size.split("x"))
            for group in (250, 12):
                path = Path(folder, f"{size}-{group}.mp4")
                write_clip(path, width, height, group)
                for count in (8, 32):
                    numbers = [int((k + 0.5) * FRAMES / count) for k in range(count)]
                    for name, run in runs(path, numbers, options):
                        row = {"size": size, "group": group, "frames": count, "decoder": name}
                        row |= measure(run, numbers, options)
                        rows.append(row)
                        print(json.dumps(row), flush=True)
    if options.json is not None:
        record = {
            "settings": vars(options),
            "machine": machine_record(),
            "software": software_record(),
            "rows": rows,
        }
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
