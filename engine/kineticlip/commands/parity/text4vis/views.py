"""The multi-view test from files to results: list, loader, evaluation loop, summary."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kineticlip.commands.parity.check import Check, compare, exactly
from kineticlip.commands.parity.text4vis.files import (
    EMBEDDINGS,
    PROBABILITIES,
    SUMS,
    Golden,
    normalised,
)
from kineticlip.commands.parity.text4vis.models import build_case, case_config
from kineticlip.config import Config, Precision, ViewConfig
from kineticlip.data.batch import VideoViews
from kineticlip.data.entries import Entry
from kineticlip.data.lists import read_list
from kineticlip.data.pipelines import PIPELINES
from kineticlip.data.scoring_loader import ScoringLoader
from kineticlip.evaluation.fingerprint import protocol_fingerprint
from kineticlip.evaluation.ready import ReadyModel, ready
from kineticlip.evaluation.recognizer import Recognizer
from kineticlip.evaluation.result_writer import ResultWriter
from kineticlip.evaluation.results import read_results
from kineticlip.evaluation.scoring import evaluate_videos
from kineticlip.methods.text4vis import METHOD
from kineticlip.methods.trunk import embed_views

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class MultiView:
    """One evaluation. indices: [N, K * T], 1-based; sums: [N, V, T, 3] of normalised pixels;
    embeddings: raw ones of the views [N, V, E]; scores: [N, C]."""

    indices: list[list[int]]
    sums: Tensor
    embeddings: Tensor
    scores: Tensor
    summary: dict[str, Any]


def write_frames(golden: Golden, folder: Path) -> None:
    """Every recorded video as a folder of lossless pictures, named as the official loader's."""
    for name, frames in golden.arrays("multiview_videos").items():
        (folder / name).mkdir()
        for number, frame in enumerate(frames, 1):
            with (folder / name / f"img_{number:05d}.jpg").open("wb") as file:
                Image.fromarray(frame).save(file, "PNG", compress_level=1)


def evaluate_run(
    golden: Golden, frames: Path, run: dict[str, Any], *, precision: Precision = "fp32"
) -> MultiView:
    """Scores the recorded list as `kineticlip eval` would; frames: folder of `write_frames`."""
    config, _ = case_config(golden, "vit_plain", header="transformer")
    config = replace(
        config,
        data=replace(config.data, num_frames=run["T"]),
        test=ViewConfig(
            clips=run["clips"],
            crops=run["crops"],
            sampling="dense" if run["dense"] else "uniform",
        ),
        eval=replace(config.eval, precision=precision),
    )
    model = build_case(golden, "vit_plain", header="transformer")
    found = ready(model, config, device=CPU, packed=False)
    listing = frames / "list.txt"
    listing.write_text("".join(f"{line}\n" for line in golden.json("case_multiview")["list"]))
    entries = read_list(listing, frames, num_classes=len(golden.class_names)).entries
    loader = ScoringLoader(entries, config, statistics=golden.vit.vision.statistics)
    videos = [video for video in loader if isinstance(video, VideoViews)]
    with torch.inference_mode():
        views = embed_views(model, videos, found.chunk)
    shape, sample = golden.vit.vision, PIPELINES["text4vis"].sample_test
    return MultiView(
        indices=[
            (sample(video.num_frames, config.data, config.test) + 1).ravel().tolist()
            for video in videos
        ],
        sums=torch.stack([normalised(v.clips(), shape).double().sum((3, 4)) for v in videos]),
        embeddings=torch.stack(views),
        **_results(golden, found, config, entries, videos),
    )


def _results(
    golden: Golden,
    found: ReadyModel,
    config: Config,
    entries: tuple[Entry, ...],
    videos: list[VideoViews],
) -> dict[str, Any]:
    """`scores` and `summary` as they come back from a results folder."""
    names = golden.class_names
    recognizer = Recognizer(
        config=config,
        class_names=names,
        method=METHOD,
        ready=found,
        weights="recorded",
        statistics=golden.vit.vision.statistics,
    )
    listing = [(entry.name, entry.label) for entry in entries]
    protocol = protocol_fingerprint(config, listing, class_names=names, weights="recorded")
    with tempfile.TemporaryDirectory() as folder:
        with ResultWriter.open(
            folder, protocol, entries=listing, class_names=names, keep_scores=True
        ) as writer:
            evaluate_videos(recognizer, videos, writer, total=len(videos), progress=False)
            writer.finish(machine={})
        results = read_results(folder)
        scores = results.scores()
    assert scores is not None
    return {"scores": torch.from_numpy(np.array(scores)), "summary": results.summary}


def multiview_checks(golden: Golden) -> Iterator[Check]:
    """Every recorded run: frame numbers, pixels, embeddings, scores, and the printed accuracy."""
    recorded = golden.tensors("case_multiview")
    with tempfile.TemporaryDirectory() as folder:
        write_frames(golden, Path(folder))
        for name, run in golden.json("case_multiview")["views"].items():
            found, prefix = evaluate_run(golden, Path(folder), run), f"multiview/{name}"
            yield exactly(f"{prefix}/indices", found.indices, run["indices_1based"])
            sums = recorded[f"{name}/input_sum_per_view_frame_channel"]
            yield compare(f"{prefix}/pixels", found.sums, sums, atol=SUMS)
            views = recorded[f"{name}/view_embeddings"]
            yield compare(f"{prefix}/embeddings", found.embeddings, views, atol=EMBEDDINGS)
            scores = recorded[f"{name}/softmax"]
            yield compare(f"{prefix}/softmax", found.scores, scores, atol=PROBABILITIES)
            yield compare(f"{prefix}/top1", found.summary["top1"], run["top1"], atol=1e-4)
            printed = re.findall(r"Overall Prec@1 ([\d.]+)% Prec@5 ([\d.]+)%", run["stdout"])
            ours = [(f"{found.summary['top1']:.3f}", f"{found.summary['top5']:.3f}")]
            yield exactly(f"{prefix}/printed", ours, printed)
