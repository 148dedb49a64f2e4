"""What 8 bits cost: the first videos of a run scored in bf16 too."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from kineticlip.data.batch import BadVideo, VideoViews
from kineticlip.evaluation.clock import one_view
from kineticlip.evaluation.ready import ReadyModel
from kineticlip.evaluation.speed import Agreement
from kineticlip.methods.method import Method

COMPARED = 4  # videos that the price of 8 bits is measured on


def compare_first(
    ready: ReadyModel, method: Method, stream: Iterable[VideoViews | BadVideo]
) -> tuple[Iterator[VideoViews | BadVideo], Agreement]:
    """(the stream, unchanged; how the model agrees with its reference on its first videos)."""
    assert ready.reference is not None
    source = iter(stream)
    first = list(itertools.islice(source, COMPARED))
    videos = [item for item in first if isinstance(item, VideoViews)]
    there = [video.to(ready.device) for video in videos]  # the stream's own stay where they are
    agreement = compare_precisions(ready.model, ready.reference, method, there, ready.chunk)
    return itertools.chain(first, source), agreement


def compare_precisions(
    model: nn.Module, reference: nn.Module, method: Method, videos: Sequence[VideoViews], chunk: int
) -> Agreement:
    """How a model agrees with a reference model on one view of some videos."""
    if not videos:
        return Agreement(videos=0, top1_agreement=100.0, top5_agreement=100.0, score_difference=0.0)
    views = [one_view(video) for video in videos]
    with torch.inference_mode():
        here = method.score(model, views, chunk).cpu()  # [N, C]
        there = method.score(reference, views, chunk).cpu()
    places = [rows.topk(min(5, rows.shape[1]), dim=-1).indices for rows in (here, there)]
    sets = [rows.sort(dim=-1).values for rows in places]
    return Agreement(
        videos=len(videos),
        top1_agreement=100 * (places[0][:, 0] == places[1][:, 0]).float().mean().item(),
        top5_agreement=100 * (sets[0] == sets[1]).all(dim=-1).float().mean().item(),
        score_difference=(here - there).abs().max().item(),
    )
