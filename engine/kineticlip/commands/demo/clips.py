"""The demo's data: short H.264 clips of coloured things in motion, whose class names are sentences.

Some pairs of thing and motion are kept out of training; their sentences are scored zero-shot.
Everything is made here from a seed: the clips carry no licence but this project's, and the small
CLIP that training starts from has never seen anything.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from kineticlip.runtime.files import write_whole

THINGS = {
    "a red ball": (225, 45, 45),
    "a green ball": (45, 190, 70),
    "a blue ball": (50, 85, 235),
    "a yellow ball": (240, 215, 50),
    "a purple ball": (165, 60, 205),
    "a white ball": (245, 245, 245),
}
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
)
# Thing i never trains with these motions; every thing and every motion still trains four times.
KEPT_OUT = tuple((i, (i + step) % len(MOTIONS)) for i in range(len(THINGS)) for step in (0, 2))

WIDTH, HEIGHT, FRAMES, RATE = 80, 64, 12, 12

ARCHITECTURE = "ViT-tiny-16"
# Positions eight times as loud as CLIP's start: what the ball does is where it is, frame by frame.
POSITION_GAIN = 8.0
# Of twelve untrained text towers the one that tells the 36 sentences apart best.
TEXT_SEED = 6
LOGIT_SCALE = 30.0


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """Lists and label files of a rendered data set."""

    root: Path
    train_list: Path
    seen_list: Path
    kept_list: Path
    kept_among_all_list: Path
    seen_labels: Path
    kept_labels: Path
    all_labels: Path


def sentences() -> tuple[list[str], list[str]]:
    """Class names (seen in training, kept out of it)."""
    names = {
        (i, j): f"{thing} {motion}"
        for i, thing in enumerate(THINGS)
        for j, motion in enumerate(MOTIONS)
    }
    seen = [name for pair, name in names.items() if pair not in KEPT_OUT]
    return seen, [names[pair] for pair in KEPT_OUT]


def render_clip(thing: int, motion: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One clip, uint8 [FRAMES, HEIGHT, WIDTH, 3]: a shaded disc before a noisy gradient."""
    colour = np.array(list(THINGS.values())[thing], dtype=np.float32)
    colour = np.clip(colour + rng.normal(0, 8, 3), 0, 255)
    time = np.linspace(0.0, 1.0, FRAMES, dtype=np.float32)
    radius: NDArray[np.floating] = np.full(FRAMES, rng.uniform(7.0, 11.0), dtype=np.float32)
    margin = 12.0
    x: NDArray[np.floating] = np.full(FRAMES, rng.uniform(margin, WIDTH - margin), dtype=np.float32)
    y: NDArray[np.floating] = np.full(
        FRAMES, rng.uniform(margin, HEIGHT - margin), dtype=np.float32
    )
    word = MOTIONS[motion]
    if word in ("moving left", "moving right", "moving up", "moving down"):
        horizontal = word in ("moving left", "moving right")
        extent = float(WIDTH if horizontal else HEIGHT)
        near = rng.uniform(margin, 0.35 * extent)
        far = rng.uniform(0.65 * extent, extent - margin)
        path = near + (far - near) * time
        path = path[::-1] if word in ("moving left", "moving up") else path
        x, y = (path, y) if horizontal else (x, path)
    else:
        small, large = rng.uniform(4.0, 6.0), rng.uniform(13.0, 18.0)
        radius = small + (large - small) * time
        radius = radius[::-1] if word == "shrinking" else radius
        x = np.full(FRAMES, rng.uniform(26.0, WIDTH - 26.0), dtype=np.float32)
        y = np.full(FRAMES, rng.uniform(22.0, HEIGHT - 22.0), dtype=np.float32)

    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    tilt = rng.normal(0, 1, 2)
    grey = 90 + 30 * (tilt[0] * rows / HEIGHT + tilt[1] * columns / WIDTH)
    ground = grey[..., None] + rng.normal(0, 12, 3)  # [H, W, 3]
    distance = np.hypot(columns - x[:, None, None], rows - y[:, None, None])  # [F, H, W]
    inside = np.clip(radius[:, None, None] - distance, 0, 1)[..., None]
    shade = np.clip(1.1 - 0.35 * distance / radius[:, None, None], 0.6, 1.1)[..., None]
    clip = ground * (1 - inside) + colour * shade * inside
    clip = clip + rng.normal(0, 4, clip.shape)
    pixels: NDArray[np.uint8] = np.clip(clip, 0, 255).astype(np.uint8)  # [F, H, W, 3]
    return pixels


def write_clip(path: Path, frames: NDArray[np.uint8]) -> None:
    """Encodes frames [F, H, W, 3] as H.264 in MP4, crf 20; the same bytes every time."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        # With macroblock trees x264 does not repeat to the bit (3 files from 30 runs, PyAV 18.1).
        options = {"crf": "20", "preset": "veryfast", "g": "8", "x264-params": "mbtree=0"}
        stream.options = options
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def render(root: Path, *, train_per_class: int, test_per_class: int, seed: int = 0) -> DemoData:
    """Renders the data set under `root`; clips that are there already are kept."""
    seen, kept = sentences()
    clips = root / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    pairs = {f"{t} {m}": (i, j) for i, t in enumerate(THINGS) for j, m in enumerate(MOTIONS)}
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "seen": [], "kept": []}
    jobs: list[tuple[Path, tuple[int, int], int]] = []
    for split, names, count in (
        ("train", seen, train_per_class),
        ("seen", seen, test_per_class),
        ("kept", kept, 2 * test_per_class),
    ):
        for name in names:
            for number in range(count):
                file = f"{split}-{name.replace(' ', '_')}-{number:03d}.mp4"
                splits[split].append((file, name))
                jobs.append((clips / file, pairs[name], len(jobs)))

    def make(job: tuple[Path, tuple[int, int], int]) -> None:
        path, (thing, motion), number = job
        if not path.exists():
            rng = np.random.default_rng([seed, number])
            with write_whole(path) as part:
                write_clip(part, render_clip(thing, motion, rng))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, jobs))

    return DemoData(
        root=clips,
        train_list=_write_list(root / "train.txt", splits["train"], seen),
        seen_list=_write_list(root / "seen.txt", splits["seen"], seen),
        kept_list=_write_list(root / "kept_out.txt", splits["kept"], kept),
        kept_among_all_list=_write_list(root / "kept_out_all.txt", splits["kept"], seen + kept),
        seen_labels=_write_labels(root / "seen.csv", seen),
        kept_labels=_write_labels(root / "kept_out.csv", kept),
        all_labels=_write_labels(root / "all.csv", seen + kept),
    )


def _write_list(path: Path, clips: Sequence[tuple[str, str]], names: Sequence[str]) -> Path:
    path.write_text("".join(f"{file} {names.index(name)}\n" for file, name in clips))
    return path


def _write_labels(path: Path, names: Sequence[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "name"))
        writer.writerows(enumerate(names))
    return path


def write_start_weights(path: Path, *, seed: int = 1) -> Path:
    """The untrained CLIP, both towers, that the demo trains from; in our own format."""
    import torch

    from kineticlip.formats import save_checkpoint
    from kineticlip.models.architectures import VisionShape, architecture
    from kineticlip.models.text import text_tower
    from kineticlip.models.vision import VisionTransformer

    model = architecture(ARCHITECTURE)
    assert isinstance(model.vision, VisionShape)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        visual = VisionTransformer(model.vision)
        visual.positional_embedding.mul_(POSITION_GAIN)
    text = text_tower(model.text, None, seed=TEXT_SEED)
    tensors = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    tensors |= {name: tensor for name, tensor in text.state_dict().items() if name != "attn_mask"}
    tensors["logit_scale"] = torch.tensor(math.log(LOGIT_SCALE))
    save_checkpoint(path, tensors, {"made_by": "kineticlip demo", "untrained": "true"})
    return path
