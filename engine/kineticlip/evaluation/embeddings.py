"""Embeddings of whole videos, for classifiers that are fitted to them.

Shape letters: N videos, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from kineticlip.config import Config
from kineticlip.data.batch import BadVideo
from kineticlip.data.entries import Entry
from kineticlip.data.scoring_loader import ScoringLoader
from kineticlip.evaluation.loop import Scored, score_stream
from kineticlip.evaluation.ready import ready
from kineticlip.methods import METHODS, method_named
from kineticlip.methods.text4vis import embed_videos, video_model
from kineticlip.methods.trunk import statistics_of
from kineticlip.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """matrix: float32 [N, E]; labels: int64 [N]; bad: the videos that could not be read."""

    matrix: Tensor
    labels: Tensor
    names: tuple[str, ...]
    bad: tuple[BadVideo, ...]


def video_embeddings(
    config: Config, entries: Sequence[Entry], *, device: torch.device, progress: bool = False
) -> Embeddings:
    """Text4Vis's embedding of each video: the mean over the configured test views, unnormalised.

    With text4vis.header `mean` that is CLIP's own, averaged over the frames. Raises UserError
    where no video can be read.
    """
    text4vis, weights = METHODS["text4vis"], method_named(config.method).weights(config)
    found = ready(video_model(config, weights), config, device=device, packed=False)
    stream = score_stream(
        found.model,
        replace(text4vis, score=embed_videos),
        ScoringLoader(
            entries, config, statistics=statistics_of(found.model), pipeline=text4vis.pipeline
        ),
        device=device,
        chunk=found.chunk,
    )
    rows, labels, names, bad = [], [], [], []
    for item in tqdm(stream, total=len(entries), unit="video", disable=not progress):
        if isinstance(item, Scored):
            rows.append(item.scores)
            labels.append(item.video.label)
            names.append(item.video.name)
        else:
            bad.append(item)
    if not rows:
        reason = f" ({bad[0].name}: {bad[0].reason})" if bad else ""
        raise UserError(f"none of {len(entries)} videos could be embedded{reason}")
    return Embeddings(
        matrix=torch.stack(rows),
        labels=torch.tensor(labels),
        names=tuple(names),
        bad=tuple(bad),
    )
