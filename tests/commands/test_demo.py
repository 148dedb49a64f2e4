"""The demo's data: what is kept out stays out, and every part of it is seen in training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from kineticlip.commands.demo.clips import (
    FRAMES,
    KEPT_OUT,
    MOTIONS,
    THINGS,
    render,
    render_clip,
    sentences,
    write_start_weights,
)
from kineticlip.data.labels import read_labels
from kineticlip.data.lists import read_list
from kineticlip.formats import read_checkpoint
from kineticlip.video import open_video


def test_kept_out_sentences_are_new_but_their_words_are_not() -> None:
    seen, kept = sentences()
    assert len(seen) + len(kept) == len(THINGS) * len(MOTIONS) and not set(seen) & set(kept)
    things = Counter(thing for thing, _ in KEPT_OUT)
    motions = Counter(motion for _, motion in KEPT_OUT)
    assert set(things.values()) == set(motions.values()) == {2}
    for thing in THINGS:
        assert sum(name.startswith(thing) for name in seen) == 4
    for motion in MOTIONS:
        assert sum(name.endswith(motion) for name in seen) == 4


def test_lists_and_labels_agree_with_the_clips(tmp_path: Path) -> None:
    data = render(tmp_path, train_per_class=1, test_per_class=1)
    _, kept = sentences()
    for listing, labels in (
        (data.train_list, data.seen_labels),
        (data.seen_list, data.seen_labels),
        (data.kept_list, data.kept_labels),
        (data.kept_among_all_list, data.all_labels),
    ):
        names = read_labels(labels)
        entries = read_list(listing, data.root, num_classes=len(names)).entries
        assert entries
        for entry in entries:
            assert names[entry.label].replace(" ", "_") in entry.name
    train = read_list(data.train_list, data.root).entries
    assert not any(name.replace(" ", "_") in entry.name for entry in train for name in kept)
    video = open_video(train[0].path)
    assert video.num_frames == FRAMES and video.probe.codec == "h264"

    first = {path.name: path.read_bytes() for path in data.root.iterdir()}
    again = render(tmp_path / "again", train_per_class=1, test_per_class=1)
    assert {path.name: path.read_bytes() for path in again.root.iterdir()} == first


def test_motions_move_as_their_names_say() -> None:
    red = 0
    for motion, axis, sign in ((0, 1, -1), (1, 1, 1), (2, 0, -1), (3, 0, 1)):
        clip = render_clip(red, motion, np.random.default_rng(3)).astype(float)
        ball = (clip[..., 0] - clip[..., 1:].mean(-1)) > 90  # [F, H, W]
        centres = [np.argwhere(frame).mean(axis=0)[axis] for frame in ball]
        assert (np.diff(centres) * sign > 0).mean() > 0.9, MOTIONS[motion]
    for motion, sign in ((4, 1), (5, -1)):
        clip = render_clip(red, motion, np.random.default_rng(3)).astype(float)
        sizes = ((clip[..., 0] - clip[..., 1:].mean(-1)) > 90).sum(axis=(1, 2))
        assert (sizes[-1] - sizes[0]) * sign > 100, MOTIONS[motion]


def test_start_weights_are_the_same_every_time(tmp_path: Path) -> None:
    first = read_checkpoint(write_start_weights(tmp_path / "a.safetensors"))
    again = read_checkpoint(write_start_weights(tmp_path / "b.safetensors"))
    assert first.metadata["untrained"] == "true"
    assert first.tensors.keys() == again.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name
