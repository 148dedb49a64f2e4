"""BIKE (CVPR'23): the words of a class name say which frames of a video to look at.

Shape letters: B clips, T frames, S side in pixels, E embedding, C classes, n tokens of a sentence,
N clips of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.data.batch import VideoViews
from kineticlip.methods.contrastive import class_tokens
from kineticlip.methods.head import average_views, kernels_of, own_loss, unit_means
from kineticlip.methods.method import Method
from kineticlip.methods.nce import gather, matching_loss
from kineticlip.methods.text4vis import TEST_SCALE, VideoCLIP, cost, param_groups, video_model
from kineticlip.methods.text_side import online_tower
from kineticlip.methods.trunk import FrozenTensors, apply_header, encode_frames, encode_views
from kineticlip.models.text import BATCH, encode_tokens
from kineticlip_kernels.head import mean_softmax

Interaction = Literal["dp", "vcs"]
Scores = Literal["head", "frames"]

SALIENCY_TEMPERATURE = 0.01


class BikeCLIP(nn.Module):
    """A VideoCLIP that keeps its frames apart until they meet the words of each class.

    sentences [C, E]: unit features of the classes' sentences; words [C, n, E]: of all their
    tokens, padding included, as in the official code; only `vcs` needs them. Both are frozen.
    """

    classifier: Tensor | None = None  # words of each class, too: no row stands for it

    def __init__(
        self,
        video: VideoCLIP,
        *,
        interaction: Interaction,
        sentences: Tensor,
        words: Tensor | None,
        scores: Scores = "head",
    ) -> None:
        super().__init__()
        self.visual, self.fusion_model = video.visual, video.fusion_model
        self.logit_scale = video.logit_scale
        self.plain_tower, self.untrained = video.plain_tower, video.untrained
        self.interaction: Interaction = interaction
        self.scores: Scores = scores
        frozen = {"sentences": F.normalize(sentences.float(), dim=-1)}
        if interaction == "vcs":
            assert words is not None
            frozen["words"] = F.normalize(words.float(), dim=-1)
        self.frozen = FrozenTensors(**frozen)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Any:
        """pixels [B, T, 3, S, S] -> logits [B, C]; with labels [B] the loss and the accuracy.

        The matching loss over the clips of all processes and the sentences of their classes.
        """
        frames = encode_frames(self.visual, pixels)  # [B, T, E]
        scale = self.logit_scale.float().exp()
        if labels is None:
            return scale * self.similarity(frames)
        frames, labels = gather(frames), gather(labels)
        logits = scale * self.similarity(frames, labels)  # [N, N]
        hits = labels[logits.detach().argmax(dim=1)] == labels
        return matching_loss(logits, labels), hits.float().mean()

    def similarity(self, frames: Tensor, classes: Tensor | None = None) -> Tensor:
        """Frame embeddings [B, T, E] against all classes, or those asked for: float32 [B, C]."""
        with torch.autocast(frames.device.type, enabled=False):
            frames = apply_header(self.fusion_model, frames).float()
            sentences = self._frozen("sentences", classes)
            if self.interaction == "dp":
                return unit_means(frames, kernels=kernels_of(self)) @ sentences.T
            return concept_spotting(frames, self._frozen("words", classes), sentences)

    def frame_scores(self, frames: Tensor) -> Tensor:
        """Raw tower outputs of one video [V, T, E] -> [C]: a softmax a frame, then their mean.

        BIKE's test_zeroshot.py (compute_accuracy) scores so, with one view. Its frame embeddings
        are not normalised: their length, about 10 for CLIP, sharpens the softmax.
        """
        logits = TEST_SCALE * frames.float() @ self._frozen("sentences", None).T  # [V, T, C]
        return mean_softmax(logits.flatten(0, 1)[None], impl=kernels_of(self))[0]

    def _frozen(self, name: str, classes: Tensor | None) -> Tensor:
        rows = cast(Tensor, getattr(self.frozen, name))
        return rows if classes is None else rows[classes]


def concept_spotting(frames: Tensor, words: Tensor, sentences: Tensor) -> Tensor:
    """Video concept spotting (BIKE, section 3.3), without parameters.

    Each word weighs the frames by a sharp softmax over their cosines with it; the mean of the
    weights over all words makes one vector of the unit frames, which is not normalised again.
    frames [B, T, E]; unit words [C, n, E], sentences [C, E] -> [B, C].
    """
    frames = F.normalize(frames, dim=-1)
    cosines = torch.einsum("cne,bte->bcnt", words, frames)
    weights = (cosines / SALIENCY_TEMPERATURE).softmax(dim=-1).mean(dim=2)  # [B, C, T]
    return torch.einsum("bct,bte,ce->bc", weights, frames, sentences)


def build(config: Config, class_names: Sequence[str]) -> BikeCLIP:
    """The video side is Text4Vis's; the frozen text tower encodes every class here, once."""
    weights = METHOD.weights(config)
    video = video_model(config, weights)
    tower = online_tower(config, weights)
    tokens = class_tokens(config, class_names, weights)
    every = config.bike.interaction == "vcs"
    sentences, words = encode_sentences(tower, tokens, words=every)
    return BikeCLIP(
        video,
        interaction=config.bike.interaction,
        sentences=sentences,
        words=words,
        scores=config.bike.scores,
    )


@torch.no_grad()
def encode_sentences(tower: Any, tokens: Tensor, *, words: bool) -> tuple[Tensor, Tensor | None]:
    """tokens [C, n] -> sentences [C, E] and, if asked for, every token projected [C, n, E]."""
    ends = tokens.argmax(dim=-1)
    length = tokens.shape[1] if words else int(ends.max()) + 1
    parts = [
        encode_tokens(tower, tower.token_embedding(rows)) @ tower.text_projection
        for rows in tokens[:, :length].split(BATCH)
    ]
    every = torch.cat(parts)  # [C, length, E]
    return every[torch.arange(len(every)), ends], every if words else None


def score(model: nn.Module, videos: Sequence[VideoViews], chunk: int) -> Tensor:
    """[len(videos), C]: softmax of the bare cosines, mean over views, and softmax once more.

    The official test does so. The second softmax flattens the scores and keeps their order.
    bike.scores: frames: see `frame_scores`.
    """
    assert isinstance(model, BikeCLIP)
    per_clip = not model.plain_tower
    frames = encode_views(model.visual, videos, chunk, per_clip=per_clip)  # [V, T, E] each
    if model.scores == "frames":
        return torch.stack([model.frame_scores(rows) for rows in frames])
    means = average_views(
        torch.cat([model.similarity(rows) for rows in frames]),
        [len(rows) for rows in frames],
        kernels=kernels_of(model),
    )
    return means.softmax(dim=-1)


METHOD = Method(
    build=build,
    loss=partial(own_loss, method="bike"),
    score=score,
    param_groups=param_groups,
    cost=cost,
    pipeline="bike",
    clip_load=True,
)
