"""BIKE: words of a class name against frames, the two softmaxes of its test, its sentence head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kineticlip.commands.parity.check import Check, compare
from kineticlip.commands.parity.text4vis.files import EMBEDDINGS, PROBABILITIES, Golden
from kineticlip.commands.parity.text4vis.models import HEADERS, build_case, case_clips
from kineticlip.data.batch import VideoViews
from kineticlip.formats import load_into
from kineticlip.methods.bike import METHOD, BikeCLIP, Interaction, encode_sentences
from kineticlip.models.text import text_tower
from kineticlip.training.attributes import SentenceHead

INTERACTIONS: dict[str, Interaction] = {"DP": "dp", "VCS": "vcs"}


def bike_checks(golden: Golden) -> Iterator[Check]:
    """Text features, logits and test scores of both headers and interactions; the sentence head."""
    recorded = golden.tensors("case_bike")
    tower = text_tower(golden.text, golden.tensors("clip_vit_base"))
    tokens = golden.tensors("case_text")["tokens"].long()
    sentences, words = encode_sentences(tower, tokens, words=True)
    assert words is not None
    yield compare("bike/cls_features", sentences, recorded["cls_features"], atol=EMBEDDINGS)
    expected = recorded["token_features_class0"]
    yield compare("bike/token_features_class0", words[0], expected, atol=EMBEDDINGS)
    clips = case_clips(golden, "vit_plain")
    frames = golden.tensors("case_vit_plain")["frame_embeddings"].unflatten(0, clips.shape[:2])
    for header in HEADERS:
        for name, interaction in INTERACTIONS.items():
            video = build_case(golden, "vit_plain", header=HEADERS[header])
            model = BikeCLIP(video, interaction=interaction, sentences=sentences, words=words)
            with torch.inference_mode():
                logits = model.similarity(frames)
                scores = METHOD.score(model.eval(), [_views(clips)], len(clips[0]))
            key = f"{header}_{name}"
            yield compare(f"bike/logits_{key}", logits, recorded[f"logits_{key}"], atol=EMBEDDINGS)
            expected = recorded[f"test_score_{key}"]
            yield compare(f"bike/test_score_{key}", scores, expected, atol=PROBABILITIES)
    yield from _sentence_checks(recorded)


def _views(clips: Tensor) -> VideoViews:
    """The clips [K, T, 3, S, S] as the views of one video."""
    count, length = clips.shape[:2]
    return VideoViews(
        name="",
        label=0,
        images=clips.flatten(0, 1).unsqueeze(1),  # [K * T, 1, 3, S, S]
        frame_index=torch.arange(count * length).view(count, length),
        crop_index=torch.zeros(1, dtype=torch.int64),
        decoder="",
        num_frames=count * length,
    )


def _sentence_checks(recorded: dict[str, Tensor]) -> Iterator[Check]:
    prefix = "sentence_weights."
    weights = {k.removeprefix(prefix): t for k, t in recorded.items() if k.startswith(prefix)}
    classes, sentences = recorded["query_cls"], recorded["sentence_cls"]  # not unit rows here
    head = SentenceHead(classes.shape[1])
    load_into(head, weights, what="case_bike.safetensors", optional=["logit_scale"])
    with torch.inference_mode():
        logits = head(sentences, classes)
    yield compare("bike/sentence_logits", logits, recorded["sentence_logits"], atol=EMBEDDINGS)
