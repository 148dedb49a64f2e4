"""Results folders made from a seed, for the tests of the report and for looking at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kineticlip.evaluation.result_writer import ResultWriter
from kineticlip.evaluation.speed import Speed
from kineticlip.runtime.journal import Json

MACHINE: dict[str, Any] = {
    "gpu": "NVIDIA H200",
    "power_limit_w": 700,
    "cpu": "Xeon 8480C",
    "cores": 16,
    "software": {"python": "3.11.7", "torch": "2.11.0", "commit": "0123abc"},
}
SPEED = Speed(
    seconds=61.25,
    videos_per_second=16.4,
    views_per_second=49.2,
    images_per_second=524.8,
    videos=1004,
    images=32144,
    chunk=256,
    tower="bf16 on cuda, one CUDA graph",
    chunk_halvings=0,
    model_images_per_second=656.0,
    percent_of_model_speed=80.0,
    decode_percent=21.5,
    transfer_percent=3.25,
    compute_percent=71.0,
    decoding="dali",
)


def make_run(
    folder: Path,
    class_names: list[str],
    *,
    videos: int,
    skill: float = 3.0,
    bad_every: int = 0,
    clips: int = 0,
    classifier: NDArray[np.float32] | None = None,
    seed: int = 0,
    weights: str = "sha256:5c1f",
    speed: Speed | None = None,
    extra: Json | None = None,
) -> Json:
    """Writes a results folder: scores are noise plus `skill` for the label; returns the summary."""
    count = len(class_names)
    rng = np.random.default_rng(seed)
    entries = [(f"{class_names[n % count].replace('/', '_')}/{n:05d}.mp4", n % count)
               for n in range(videos)]  # fmt: skip
    protocol: dict[str, Any] = {
        "method": "text4vis", "arch": "ViT-L-14-336", "weights": weights, "classifier": "text",
        "frames": 32, "clips": 1, "crops": 3, "resolution": 336, "precision": "bf16",
        "list_sha256": f"{videos:064d}", "labels_sha256": f"{count:064d}",
        "config": {"method": "text4vis", "test": {"clips": 1, "crops": 3}},
    }  # fmt: skip
    difficulty = rng.normal(0, 0.35 * skill, count)
    with ResultWriter.open(folder, protocol, entries=entries, class_names=class_names) as writer:
        if classifier is not None:
            writer.save_classifier(classifier)
        for n, (video, label) in enumerate(entries):
            if bad_every and n % bad_every == bad_every - 1:
                writer.add_bad(video, "moov atom not found" if n % 2 else "no video stream")
                continue
            if n < clips:
                writer.save_thumbnail(video, picture(rng, label))
            logits = rng.normal(0, 1, count)
            logits[label] += skill + difficulty[label]
            logits[(label + 1) % count] += 0.5 * skill - difficulty[label]
            scores = np.exp(2 * logits) / np.exp(2 * logits).sum()
            writer.add(video, scores, views=3, frames=300, decoder="torchcodec")
        return writer.finish(machine=MACHINE, speed=speed, extra=extra)


def picture(rng: np.random.Generator, label: int) -> NDArray[np.uint8]:
    """Four frames [4, 90, 120, 3] of a disc that moves over a gradient."""
    rows, columns = np.mgrid[0:90, 0:120]
    colour = 60 + 150 * np.array([np.sin(label) ** 2, np.cos(label) ** 2, 0.5])
    ground = 40 + 0.8 * rows[..., None] + rng.normal(0, 10, 3) + 0.3 * columns[..., None]
    frames = [
        np.where((np.hypot(columns - 25 - 22 * n, rows - 45) < 18)[..., None], colour, ground)
        for n in range(4)
    ]
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def text_like(class_names: list[str], width: int = 64) -> NDArray[np.float32]:
    """A classifier [C, E] whose rows share what their names' words share, as text features do."""
    words = sorted({word for name in class_names for word in name.split()})
    rng = np.random.default_rng(7)
    vectors = {word: rng.normal(size=width) for word in words}
    common = 2.5 * rng.normal(size=width)
    rows = [common + sum(vectors[word] for word in name.split()) for name in class_names]
    return np.stack(rows).astype(np.float32)


def orthogonal(count: int, width: int = 64) -> NDArray[np.float32]:
    """Random orthogonal rows [C, E]."""
    basis, _ = np.linalg.qr(np.random.default_rng(8).normal(size=(width, width)))
    return basis[:count].astype(np.float32)
