"""Replays the official EVL code's recorded outputs: models, gradients, optimiser steps, scores.

A model is a subfolder with a config.json; sizes and switches are read from the files. Forward
passes may differ by 1e-5 of a tensor's largest value and gradients by 5e-5. The bias of the keys
is left out: its gradient is zero, and what is recorded of it is rounding noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kineticlip.commands.parity.check import Check, attempt, compare, exactly
from kineticlip.commands.parity.evl import data
from kineticlip.commands.parity.evl.files import checkpoint_checks, checkpoint_keys
from kineticlip.commands.parity.evl.model import (
    FORWARD,
    construction,
    conversion,
    forward_checks,
    load_model,
    read_tensors,
    variant,
)
from kineticlip.commands.parity.evl.training import learning_rates, three_steps
from kineticlip.data.batch import VideoViews
from kineticlip.evaluation.metrics import topk_accuracy
from kineticlip.methods.evl import METHOD


def checks(folder: Path) -> Iterator[Check]:
    """Every recorded file of a folder, in the order of its README."""
    yield from attempt("keys", checkpoint_keys(folder))
    models = sorted(path.parent for path in folder.glob("*/config.json"))
    yield exactly("at least one recorded model", bool(models), True)
    for path in models:
        yield from attempt(path.name, _model(path))
    yield from attempt("data", data.checks(folder))
    yield from attempt("eval", _evaluation(folder))
    yield from attempt("lr", learning_rates(folder))
    yield from attempt("checkpoint", checkpoint_checks(folder))


def _model(folder: Path) -> Iterator[Check]:
    name, sizes = folder.name, json.loads((folder / "config.json").read_text())
    yield from construction(name, sizes)
    if (folder / "clip_conversion.json").is_file():
        yield from conversion(folder)
    recorded = read_tensors(folder / "io.safetensors")
    model = load_model(folder)
    clip = recorded["clip"].float().transpose(1, 2)  # [B, T, 3, H, W]
    yield from forward_checks(name, model, clip, recorded)
    variants = read_tensors(folder / "variants.safetensors")
    for tag in sorted({key.split(".")[0] for key in variants}):
        model = load_model(folder, variant=tag)
        norms = sizes["grad_norms"][tag]
        seen = {
            k.removeprefix(f"{tag}."): t for k, t in variants.items() if k.startswith(f"{tag}.")
        }
        yield from variant(f"{name} {tag}", model, clip, recorded["labels"], seen, norms)
    if (folder / "train3.json").is_file():
        yield from three_steps(folder, clip, recorded["labels"])


def _evaluation(folder: Path) -> Iterator[Check]:
    """Views to logits to scores to the line that the official code prints."""
    facts = json.loads((folder / "eval.json").read_text())
    recorded = read_tensors(folder / "eval.safetensors")
    model = load_model(folder / facts["model"])
    scores, labels = [], []
    for video in range(facts["num_videos"]):
        logits, expected = recorded[f"logits.{video}"], recorded[f"scores.{video}"]
        mean = logits.softmax(dim=-1).mean(dim=0)
        if f"views.{video}" in recorded:
            views = recorded[f"views.{video}"].float()  # [V, 3, T, H, W], one dimension more or not
            views = views.reshape(-1, *views.shape[-4:]).transpose(1, 2)  # [V, T, 3, H, W]
            with torch.no_grad():
                yield compare(
                    f"eval: logits {video}", model(views), logits, atol=FORWARD, relative=True
                )
                mean = METHOD.score(model, [_as_video(views)], 1)[0]
        yield compare(f"eval: scores {video}", mean, expected.flatten(), atol=FORWARD)
        scores.append(mean.tolist())
        labels.append(int(recorded[f"label.{video}"]))
    top1, top5 = (topk_accuracy(scores, labels, k=min(k, len(scores[0]))) for k in (1, 5))
    line = f"Accuracy on validation set: top1={top1:.2f}%, top5={top5:.2f}%"
    yield exactly("eval: accuracy", [line], facts["printed"])


def _as_video(views: Tensor) -> VideoViews:
    """Views [V, T, 3, H, W] as the frames of V clips of one video."""
    clips, frames = views.shape[:2]
    return VideoViews(
        name="recorded",
        label=0,
        images=views.flatten(0, 1)[:, None],
        frame_index=torch.arange(clips * frames).view(clips, frames),
        crop_index=torch.zeros(1, dtype=torch.int64),
        decoder="recorded",
        num_frames=clips * frames,
    )
