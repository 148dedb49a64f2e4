"""BIKE against the official code's outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kineticlip.config import (
    BikeConfig,
    ClassifierConfig,
    Config,
    DataConfig,
    ModelConfig,
    Text4VisConfig,
)
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.methods import METHODS
from kineticlip.methods.bike import METHOD, BikeCLIP, build, encode_sentences
from kineticlip.methods.nce import matching_loss
from kineticlip.methods.text4vis import VideoCLIP
from kineticlip.models.architectures import architecture
from kineticlip.models.temporal import TemporalTransformer
from kineticlip.models.text import text_tower, tokenize
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.errors import UserError
from text4vis_golden import ARCHITECTURE, ATOL, FRAMES, VISION, tensors, under

Official = Literal["DP", "VCS"]  # the official names of the interactions
GOLDEN = tensors("case_bike")
PIXELS = tensors("frames_vit")["frames_vit"].unflatten(0, (-1, FRAMES))
HEADERS = {"None": False, "Transf": True}


def encoded(words: bool = True) -> tuple[Tensor, Tensor | None]:
    tower = text_tower(ARCHITECTURE.text, tensors("clip_vit_base"))
    return encode_sentences(tower, tensors("case_text")["tokens"].long(), words=words)


def official(header: str, interaction: Official) -> BikeCLIP:
    state = tensors("clip_vit_base")
    visual = VisionTransformer(VISION)
    visual.load_state_dict(under("visual.", state))
    transformer: nn.Module | None = None
    if HEADERS[header]:
        transformer = TemporalTransformer(ARCHITECTURE.embed, ARCHITECTURE.header_heads)
        transformer.load_state_dict(under("fusion_model.", tensors("fusion_transf")))
    video = VideoCLIP(visual, transformer, embed=ARCHITECTURE.embed)
    sentences, words = encoded()
    kind: Literal["dp", "vcs"] = "dp" if interaction == "DP" else "vcs"
    return BikeCLIP(video, interaction=kind, sentences=sentences, words=words).eval()


def test_sentences_and_words_of_the_official_code() -> None:
    sentences, words = encoded()
    assert words is not None
    torch.testing.assert_close(sentences, GOLDEN["cls_features"], atol=ATOL, rtol=0)
    torch.testing.assert_close(words[0], GOLDEN["token_features_class0"], atol=ATOL, rtol=0)
    cut, none = encoded(words=False)
    assert none is None
    torch.testing.assert_close(cut, sentences, atol=1e-5, rtol=0)


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("interaction", ["DP", "VCS"])
def test_official_logits_and_scores(header: str, interaction: Official) -> None:
    model = official(header, interaction)
    with torch.inference_mode():
        logits = model(PIXELS) / model.logit_scale.exp()
    torch.testing.assert_close(logits, GOLDEN[f"logits_{header}_{interaction}"], atol=1e-5, rtol=0)
    # The official test took the clips of the batch as the views of one video.
    video = VideoViews(
        name="a",
        label=0,
        images=PIXELS.flatten(0, 1).unsqueeze(1),
        frame_index=torch.arange(PIXELS.shape[0] * FRAMES).view(-1, FRAMES),
        crop_index=torch.tensor([0]),
        decoder="test",
        num_frames=99,
    )
    with torch.inference_mode():
        scores = METHOD.score(model, [video, video], 3)
    expected = GOLDEN[f"test_score_{header}_{interaction}"]
    torch.testing.assert_close(scores, expected.expand(2, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("interaction", ["DP", "VCS"])
def test_training_matches_clips_with_the_sentences_of_the_batch(interaction: Official) -> None:
    model = official("Transf", interaction).train()
    labels = torch.tensor([7, 3])
    value, metrics = METHOD.loss(model, Batch(pixels=PIXELS, labels=labels, names=()))
    logits = model.logit_scale.detach().exp() * GOLDEN[f"logits_Transf_{interaction}"][:, labels]
    torch.testing.assert_close(value, matching_loss(logits, labels), atol=1e-4, rtol=0)
    hits = logits.argmax(1) == torch.tensor([0, 1])
    assert metrics["accuracy"] == hits.float().mean()
    value.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"visual", "fusion_model", "logit_scale"}  # no text tower
    clip, new = METHOD.param_groups(model, Config())
    assert model.fusion_model is not None
    assert len(new["params"]) == len(list(model.fusion_model.parameters()))
    assert clip["lr"] == pytest.approx(0.1 * new["lr"])


def test_frame_scores_are_those_of_the_official_zero_shot_test() -> None:
    model = build(tiny(scores="frames"), ("red ball", "blue ball", "gray ball")).eval()
    images = torch.randint(0, 256, (3, 1, 3, 64, 64), dtype=torch.uint8)
    index, crops = torch.tensor([[0, 1, 2, 1]]), torch.tensor([0])
    video = VideoViews(
        name="a", label=0, images=images, frame_index=index, crop_index=crops, decoder="",
        num_frames=3,
    )  # fmt: skip
    with torch.inference_mode():
        scores = METHOD.score(model, [video], 2)
        features = model.visual(images.squeeze(1))[[0, 1, 2, 1]]  # raw: not normalised
        sentences = model.frozen.get_buffer("sentences")
        expected = torch.stack([(100 * row @ sentences.T).softmax(0) for row in features]).mean(0)
        header = METHOD.score(build(tiny(), ("red ball", "blue ball", "gray ball")), [video], 2)
    torch.testing.assert_close(scores[0], expected, atol=1e-5, rtol=0)
    assert (scores - header).abs().max() > 0.01


def tiny(**options: Any) -> Config:
    return Config(
        method="bike",
        model=ModelConfig(arch="ViT-tiny-16", weights="random"),
        classifier=ClassifierConfig(template="bike"),
        data=DataConfig(resolution=64),
        text4vis=Text4VisConfig(header_layers=1),
        bike=BikeConfig(**options),
    )


def test_build_reads_the_template() -> None:
    names = ("red ball", "blue ball")
    tokens = tokenize([f"This is a video about {name}" for name in names])
    model = METHODS["bike"].build(tiny(), names)
    assert isinstance(model, BikeCLIP) and model.untrained == ("visual",)
    tower = text_tower(architecture("ViT-tiny-16").text, None, seed=Config().seed)
    expected, words = encode_sentences(tower, tokens, words=True)
    assert words is not None
    frozen = model.frozen.get_buffer("words")
    torch.testing.assert_close(frozen, F.normalize(words, dim=-1))
    torch.testing.assert_close(
        model.frozen.get_buffer("sentences"), F.normalize(expected, dim=-1), atol=1e-5, rtol=0
    )
    assert not hasattr(build(tiny(interaction="dp"), names).frozen, "words")
    with pytest.raises(UserError, match="needs source text, one template"):
        build(replace(tiny(), classifier=ClassifierConfig(source="random_normal")), names)
