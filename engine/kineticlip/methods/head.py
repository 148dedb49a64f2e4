"""From embeddings to logits, losses and scores: what the methods with class rows share.

Shape letters: B clips or videos, T frames, V views of a video, E embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.data.batch import Batch
from kineticlip.methods.method import Metrics
from kineticlip.runtime.errors import UserError
from kineticlip_kernels.dispatch import Impl
from kineticlip_kernels.head import class_cross_entropy, mean_normalize, mean_softmax, top_classes


def kernels_of(model: nn.Module) -> Impl:
    """The face of the kernels that the model's tower was built with; a ResNet's is auto."""
    return cast(Impl, getattr(model.visual, "kernels", "auto"))


def unit_means(embeddings: Tensor, *, kernels: Impl = "auto") -> Tensor:
    """The means over frames or views [B, T, E], scaled to length one: float32 [B, E]."""
    with torch.autocast(embeddings.device.type, enabled=False):
        return mean_normalize(embeddings.float(), impl=kernels)


def cosine_logits(videos: Tensor, rows: Tensor, scale: Tensor | float) -> Tensor:
    """scale * cosine of video embeddings [B, E] and unit rows [C, E], float32 [B, C]."""
    return unit_logits(F.normalize(videos.float(), dim=-1), rows, scale)


def unit_logits(units: Tensor, rows: Tensor, scale: Tensor | float) -> Tensor:
    """The same from unit embeddings.

    Never in half precision: at values of 30 to 100 its steps are 0.03 to 0.06.
    """
    with torch.autocast(units.device.type, enabled=False):
        return scale * units.float() @ rows.T


def class_loss(
    units: Tensor, rows: Tensor, labels: Tensor, scale: Tensor, *, kernels: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Cross entropy over all classes and accuracy, both scalar, without logits [B, C] on a GPU.

    units float32 [B, E] and rows float32 [C, E], of length one; labels int64 [B].
    """
    with torch.autocast(units.device.type, enabled=False):
        losses = class_cross_entropy(units, rows, labels, scale, impl=kernels)
        _, best = top_classes(units.detach(), rows.detach(), 1, impl=kernels)
    return losses.mean(), (best.squeeze(1) == labels).float().mean()


def own_loss(model: Callable[..., Any], batch: Batch, *, method: str) -> tuple[Tensor, Metrics]:
    """What a model makes of pixels and labels by itself: its loss, and its accuracy to log."""
    check_single_labels(batch, method=method)
    value, accuracy = model(batch.pixels, batch.labels)
    return value, {"accuracy": accuracy}


def check_single_labels(batch: Batch, *, method: str) -> None:
    """UserError for clips with several labels, which only losses on logits take."""
    if batch.labels.is_floating_point():
        raise UserError(f"method {method}: clips with several labels are not supported")


def cross_entropy(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Metrics]:
    """Of a model's logits; a clip with several labels spreads its probability evenly over them."""
    logits: Tensor = model(batch.pixels)  # [B, C]
    labels = batch.labels
    top1 = logits.detach().argmax(dim=-1)
    if labels.is_floating_point():
        hits = labels.gather(1, top1[:, None]).squeeze(1)
        labels = labels / labels.sum(dim=1, keepdim=True)
    else:
        hits = (top1 == labels).float()
    return F.cross_entropy(logits, labels), {"accuracy": hits.mean()}


def view_scores(
    views: Sequence[Tensor], logits: Callable[[Tensor], Tensor], *, kernels: Impl = "auto"
) -> Tensor:
    """Probabilities [videos, C]: the mean over each video's views [V, E] of their softmax."""
    counts = [len(rows) for rows in views]
    return average_views(logits(torch.cat(list(views))), counts, kernels=kernels)


def average_views(logits: Tensor, counts: Sequence[int], *, kernels: Impl = "auto") -> Tensor:
    """The same from logits [views, C] of all videos; counts: how many views each of them has."""
    videos = [part.unsqueeze(0) for part in logits.split(list(counts))]  # [1, V, C] each
    return torch.cat([mean_softmax(video, impl=kernels) for video in videos])


def unit_videos(views: Sequence[Tensor], *, kernels: Impl = "auto") -> Tensor:
    """Each video's raw view embeddings [V, E] averaged, then scaled to length one: [videos, E]."""
    return torch.cat([unit_means(rows.unsqueeze(0), kernels=kernels) for rows in views])
