"""BIKE's attributes branch: sentences made of a video's likeliest classes, scored by two networks.

The attributes of a video are class names, best first, from a zero-shot evaluation; the sentence
that lists them meets the sentences of the classes. Only text takes part, so its features are
computed once and the two small networks train on those.

Shape letters: N videos, C classes, E embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kineticlip.config import Config
from kineticlip.methods import method_named
from kineticlip.methods.nce import matching_loss
from kineticlip.methods.trunk import seeded
from kineticlip.models.classifier import text_weights
from kineticlip.models.prompts import expand_templates, render
from kineticlip.models.text import text_features
from kineticlip.runtime.errors import UserError
from kineticlip.runtime.files import write_atomic
from kineticlip.training.optim import build_optimizer, rate_factor

COUNT = 5  # attributes in a sentence
LOGIT_SCALE = 4.6052  # ln 100, CLIP's


class SentenceHead(nn.Module):
    """Two networks under the official names, and CLIP's logit scale, which trains with them."""

    def __init__(self, embed: int) -> None:
        super().__init__()
        self.query_fc = _network(embed)
        self.sentence_fc = _network(embed)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))

    def forward(self, sentences: Tensor, classes: Tensor) -> Tensor:
        """Unit text features of videos [N, E] and classes [C, E] -> cosines [N, C]."""
        videos = F.normalize(self.sentence_fc(sentences), dim=-1)
        cosines: Tensor = videos @ F.normalize(self.query_fc(classes), dim=-1).T
        return cosines


def _network(embed: int) -> nn.Sequential:
    """Official starting values: N(0, 0.02) and zero biases."""
    layers = nn.Linear(embed, embed), nn.Linear(embed, embed)
    for linear in layers:
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


@dataclass(frozen=True, kw_only=True)
class Attributed:
    """Text features of videos float32 [N, E], unit rows, and their labels [N]."""

    sentences: Tensor
    labels: Tensor


def read_attributes(path: str | Path) -> dict[str, tuple[str, ...]]:
    """The official JSON: video path -> {"classname_topk": [names, best first]}."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        return {video: tuple(entry["classname_topk"]) for video, entry in stored.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such attributes file") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an attributes file: {error!r}") from None


def write_attributes(attributes: Mapping[str, Sequence[str]], path: str | Path) -> None:
    """Writes the official JSON."""
    stored = {video: {"classname_topk": list(names)} for video, names in attributes.items()}
    write_atomic(Path(path), json.dumps(stored, indent=1).encode())


def encode_attributes(
    config: Config,
    listing: Sequence[tuple[str, int]],
    attributes: Mapping[str, Sequence[str]],
    source: str,
    device: torch.device,
) -> Attributed:
    """Features of the sentences about the listed (video, label) pairs.

    The sentence is the classes' template around the first five names. UserError for a video
    without attributes, and for one with several labels or none.
    """
    several = [video for video, label in listing if label < 0]
    if several:
        raise UserError(f"{several[0]}: attributes need lists with one label a video")
    missing = [video for video, _ in listing if video not in attributes]
    if missing:
        raise UserError(
            f"{source}: no attributes of {len(missing)} videos, {missing[0]} and others"
        )
    phrases = [",".join(attributes[video][:COUNT]) for video, _ in listing]
    distinct = list(dict.fromkeys(phrases))  # classes repeat, and so do their sentences
    place = {phrase: row for row, phrase in enumerate(distinct)}
    features = encode_names(config, distinct, device=device, truncate=True)
    return Attributed(
        sentences=features[[place[phrase] for phrase in phrases]],
        labels=torch.tensor([label for _, label in listing]),
    )


def encode_names(
    config: Config, names: Sequence[str], *, device: torch.device, truncate: bool = False
) -> Tensor:
    """Unit features [C, E] of the configured template around each name."""
    weights, _ = text_weights(config, rounded=method_named(config.method).rounds_clip(config))
    (template, *_) = expand_templates((config.classifier.template,))
    prompts = render(template, names)
    features = text_features(weights, prompts, seed=config.seed, truncate=truncate, device=device)
    return F.normalize(features, dim=-1)


def fit(config: Config, videos: Attributed, classes: Tensor) -> SentenceHead:
    """Trains a head on all of them for config.train.epochs, in batches of train.batch_size.

    The matching loss between the videos of a batch and their classes, AdamW, the logit scale at
    lr * clip_ratio as all that is CLIP's; the order of the videos comes from config.seed. What
    does not fill a batch waits for the next epoch's shuffle.
    """
    options, count = config.optim, len(videos.labels)
    size = min(config.train.batch_size, count)
    with seeded(config.seed):
        head = SentenceHead(classes.shape[1])
    networks = [p for name, p in head.named_parameters() if name != "logit_scale"]
    groups = [
        {"params": [head.logit_scale], "lr": options.lr * options.clip_ratio},
        {"params": networks, "lr": options.lr},
    ]
    optimizer = build_optimizer(groups, options)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(config.seed)
    steps = count // size
    for step in range(int(config.train.epochs * steps)):
        if step % steps == 0:
            order = torch.randperm(count, generator=generator)
        rows = order[step % steps * size :][:size]
        factor = rate_factor((step + 0.5) / steps, options, epochs=config.train.epochs)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        labels = videos.labels[rows]
        logits = head.logit_scale.exp() * head(videos.sentences[rows], classes[labels])
        optimizer.zero_grad()
        matching_loss(logits, labels).backward()
        optimizer.step()
    return head.eval()


@torch.no_grad()
def score(head: SentenceHead, sentences: Tensor, classes: Tensor) -> Tensor:
    """Softmax of the bare cosines, as the official test takes it: [N, C]."""
    cosines: Tensor = head(sentences, classes)
    return cosines.softmax(dim=-1)


def fuse(videos: Tensor, attributes: Tensor, *, share: float = 0.7) -> Tensor:
    """The weighted sum of both branches' scores [N, C]; `share` is the video branch's."""
    return share * videos + (1 - share) * attributes


def load_head(path: str | Path, embed: int) -> SentenceHead:
    """A head from a .safetensors file. UserError for anything else."""
    head = SentenceHead(embed)
    try:
        head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: no head of width {embed}: {problem}") from None
    return head.eval()
