"""A few short videos of moving patterns and the list of them."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def moving_clips(folder: Path, count: int, *, classes: int = 3) -> Path:
    """Writes v0.mp4, ... of 9 to 15 frames and list.txt with their labels; -> the list."""
    lines = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (10, 12, 3), np.uint8)
        pattern = noise.repeat(8, axis=0).repeat(8, axis=1)  # [80, 96, 3]
        with av.open(str(folder / f"v{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
            for step in range(9 + 2 * (number % 4)):
                frame = av.VideoFrame.from_ndarray(np.roll(pattern, 3 * step, axis=1), "rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        lines.append(f"v{number}.mp4 {number % classes}\n")
    (folder / "list.txt").write_text("".join(lines))
    return folder / "list.txt"
