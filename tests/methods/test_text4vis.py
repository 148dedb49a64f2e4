"""The Text4Vis model against the official code's outputs, and its place in the loops."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kineticlip.config import ClassifierConfig, Config, DataConfig, ModelConfig, Text4VisConfig
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.methods import METHODS
from kineticlip.methods.text4vis import METHOD, VideoCLIP, build
from kineticlip.methods.trunk import embed_views
from kineticlip.models import architectures
from kineticlip.models.classifier import Classifier, save_classifier
from kineticlip.models.transformer import Transformer
from kineticlip.runtime.errors import UserError
from text4vis_golden import ARCHITECTURE, ATOL, FRAMES, GOLDEN, arrays, tensors, under

CLASSES = tuple(f"class {index}" for index in range(len(tensors("case_text")["text_features"])))
Make = Callable[..., VideoCLIP]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """make(case, frames=T, **text4vis options): the official case's model, from a file like its."""
    monkeypatch.setitem(architectures._TABLE, "golden", ARCHITECTURE)
    classifier = Classifier(tensors("case_text")["text_features"], CLASSES)
    save_classifier(classifier, tmp_path / "text.safetensors")

    def made(case: str = "plain", *, frames: int = FRAMES, **options: Any) -> VideoCLIP:
        state = tensors("clip_vit_base") | tensors("fusion_transf")
        state = {k: v for k, v in state.items() if k.startswith(("visual.", "fusion", "logit"))}
        state |= under("weights.", tensors(f"case_vit_{case}"))
        torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "model.pt")
        return build(
            Config(
                model=ModelConfig(arch="golden", weights=str(tmp_path / "model.pt")),
                classifier=ClassifierConfig(source=str(tmp_path / "text.safetensors")),
                data=DataConfig(num_frames=frames, resolution=ARCHITECTURE.vision.resolution),
                text4vis=Text4VisConfig(**options),
            ),
            CLASSES,
        ).eval()

    return made


@pytest.mark.parametrize("case", ["plain", "tokenshift", "tokent1d", "tsm", "joint", "T1"])
@pytest.mark.parametrize("header", ["mean", "transformer"])
def test_official_embeddings_and_logits(
    make: Make, case: str, header: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    frames = 1 if case == "T1" else FRAMES
    module = case if case in ("tokenshift", "tokent1d", "tsm") else "none"
    model = make(case, frames=frames, temporal_module=module, joint=case == "joint", header=header)
    pixels = tensors("frames_vit")["frames_vit"][: 3 if case == "T1" else None]
    clips = pixels.unflatten(0, (-1, frames))
    golden, name = tensors(f"case_vit_{case}"), {"mean": "None", "transformer": "Transf"}[header]
    with torch.inference_mode():
        embeddings, logits = model.encode_clips(clips), model(clips)
    expected = golden[f"video_embedding_{name}"]
    torch.testing.assert_close(embeddings, expected, atol=ATOL, rtol=0)
    torch.testing.assert_close(logits, golden[f"logits_{name}"], atol=ATOL, rtol=0)
    idle = header == "transformer" and case in ("joint", "T1")
    assert ("idle" in caplog.text) == idle
    if header == "transformer" and not idle:
        assert not torch.allclose(expected, golden["video_embedding_None"], atol=1e-2)


def views_of(video: np.ndarray, indices: list[int], run: dict[str, int], name: str) -> VideoViews:
    """One video as the loaders hand it over: distinct frames and crops once, and where to look."""
    side = ARCHITECTURE.vision.resolution
    distinct, position = np.unique(indices, return_inverse=True)
    height, width = video.shape[1:3]
    scale = side / min(width, height)
    size = (int(width * scale), side) if width > height else (side, int(height * scale))
    if width == height:
        size = (side, side)
    frames = np.stack(
        [
            np.asarray(Image.fromarray(video[index - 1]).resize(size, Image.Resampling.BICUBIC))
            for index in distinct
        ]
    )
    w4, h4 = (size[0] - side) // 4, (size[1] - side) // 4
    corners = {
        1: [(round((size[0] - side) / 2), round((size[1] - side) / 2))],
        3: [(0, 2 * h4), (4 * w4, 2 * h4), (2 * w4, 2 * h4)],
        5: [(0, 0), (4 * w4, 0), (0, 4 * h4), (4 * w4, 4 * h4), (2 * w4, 2 * h4)],
    }[run["crops"]]
    boxes = sorted(set(corners))
    crops = [frames[:, top : top + side, left : left + side] for left, top in boxes]
    images = torch.from_numpy(np.stack(crops, axis=1)).permute(0, 1, 4, 2, 3)  # [U, V, 3, S, S]
    return VideoViews(
        name=name,
        label=0,
        images=images.contiguous(),
        frame_index=torch.from_numpy(position).view(run["clips"], run["T"]),
        crop_index=torch.tensor([boxes.index(corner) for corner in corners]),
        decoder="test",
        num_frames=len(video),
    )


def embed(model: VideoCLIP, videos: list[VideoViews], chunk: int) -> list[Tensor]:
    return embed_views(model, videos, chunk)


RUNS = json.loads((GOLDEN / "case_multiview.json").read_text())["views"]


@pytest.mark.parametrize("run", RUNS)
def test_official_multi_view_scores(make: Make, run: str) -> None:
    model, golden = make(), tensors("case_multiview")
    source = arrays("multiview_videos")
    videos = [
        views_of(source[f"video{index}"], indices, RUNS[run], f"video{index}")
        for index, indices in enumerate(RUNS[run]["indices_1based"])
    ]
    with torch.inference_mode():
        # 7 divides no number of images here: videos share forwards, and the last one is ragged
        views = torch.stack(embed(model, videos, 7))
        scores = METHOD.score(model, videos, 7)
    expected = golden[f"{run}/view_embeddings"]
    torch.testing.assert_close(views, expected, atol=ATOL, rtol=0)
    torch.testing.assert_close(scores, golden[f"{run}/softmax"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["tsm", "joint"])
def test_towers_that_mix_frames_get_whole_clips(make: Make, case: str) -> None:
    options = {"joint": True} if case == "joint" else {"temporal_module": case}
    model = make(case, **options)
    source, run = arrays("multiview_videos"), RUNS["T4_3crops_4clips"]
    videos = [
        views_of(source[f"video{index}"], run["indices_1based"][index], run, "")
        for index in range(2)
    ]
    with torch.inference_mode():
        found = embed(model, videos, 5)
        for views, video in zip(found, videos, strict=True):
            torch.testing.assert_close(views, model.encode_clips(video.clips()))


def batch(labels: Tensor) -> Batch:
    pixels = tensors("frames_vit")["frames_vit"].unflatten(0, (-1, FRAMES))
    return Batch(pixels=pixels, labels=labels, names=("a", "b"))


def test_loss_and_gradients(make: Make) -> None:
    model = make()
    labels = torch.tensor([7, 3])
    value, metrics = METHOD.loss(model, batch(labels))
    logits = tensors("case_vit_plain")["logits_Transf"]
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)
    assert metrics["accuracy"] == (logits.argmax(-1) == labels).float().mean()
    value.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    several = torch.zeros(2, len(CLASSES))
    several[0, [1, 4]] = several[1, [0, 2]] = 1
    value, metrics = METHOD.loss(model, batch(several))
    log = logits.log_softmax(-1)
    torch.testing.assert_close(
        value, -(log[0, [1, 4]].mean() + log[1, [0, 2]].mean()) / 2, atol=1e-4, rtol=0
    )
    assert metrics["accuracy"] in (0, 0.5, 1)


def test_parameter_groups_are_the_official_ones(make: Make) -> None:
    config = Config()
    model = make("tokent1d", temporal_module="tokent1d")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    clip, new = METHOD.param_groups(model, config)
    assert (clip["lr"], new["lr"], clip["weight_decay"], new["weight_decay"]) == (
        5e-6, 5e-5, 0.2, 0.2,
    )  # fmt: skip
    grouped = [{names[id(parameter)] for parameter in group["params"]} for group in (clip, new)]
    assert grouped[0] | grouped[1] == set(names.values())
    expected = {
        name for name in names.values() if name.startswith("fusion_model") or "control" in name
    }
    assert grouped[1] == expected and "logit_scale" in grouped[0]
    assert len(METHOD.param_groups(make(header="mean"), config)) == 1
    idle = make("joint", joint=True)  # an unused header must not wait for gradients
    assert len(METHOD.param_groups(idle, config)) == 1


def test_state_dict_has_the_official_keys(make: Make) -> None:
    keys = set(make().state_dict())
    official = {k for k in tensors("clip_vit_base") if k.startswith("visual.")}
    assert keys == official | set(tensors("fusion_transf")) | {"logit_scale"}


def test_classifier_stays_in_float32(make: Make) -> None:
    model = make()
    before = model.classifier.clone()
    model = model.to(torch.bfloat16)
    assert model.classifier.dtype == torch.float32 and torch.equal(model.classifier, before)
    with torch.inference_mode():
        logits = model(batch(torch.tensor([0, 1])).pixels)
    assert logits.dtype == torch.float32
    exact = tensors("case_vit_plain")["logits_Transf"]
    assert torch.equal(logits.argmax(-1), exact.argmax(-1))
    with pytest.raises(UserError, match=r"rows of 3, embeddings of 64"):
        model.set_classifier(Classifier(torch.ones(1, 3), ("a",)))


def test_half_precision_trunk_under_a_float32_head(make: Make) -> None:
    model = make()
    model.visual.to(torch.bfloat16)
    with torch.inference_mode():
        logits = model(batch(torch.tensor([0, 1])).pixels)
    assert logits.dtype == torch.float32
    exact = tensors("case_vit_plain")["logits_Transf"]
    assert (logits - exact).abs().max() < 0.05 * exact.abs().max()


def tiny(**options: Any) -> Config:
    return Config(
        model=ModelConfig(arch="ViT-tiny-16", weights="random"),
        data=DataConfig(resolution=64),
        text4vis=Text4VisConfig(header_layers=1, **options),
    )


def test_random_models_follow_the_seed() -> None:
    assert METHODS["text4vis"] is METHOD
    before = torch.random.get_rng_state()
    one, same, other = (
        build(replace(tiny(), seed=seed), ("red ball", "blue ball")) for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    for (name, first), (_, second), (_, third) in zip(
        one.named_parameters(), same.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(first, second), name
        if name.endswith("in_proj_weight"):
            assert not torch.equal(first, third), name
    assert torch.equal(one.classifier, same.classifier)
    assert not torch.allclose(one.classifier, other.classifier)


def test_header_of_a_file_that_is_not_wanted(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert make(header="mean").fusion_model is None
    assert "leaves it out" in caplog.text


def test_options_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="ViT-tiny-16 takes 64 px, not 32"):
        build(replace(tiny(), data=DataConfig(resolution=32)), ("a",))
    with pytest.raises(UserError, match="cannot be combined"):
        build(tiny(joint=True, temporal_module="tsm"), ("a",))
    resnet = replace(
        tiny(temporal_module="tokent1d"), model=ModelConfig(arch="RN50", weights="random")
    )
    with pytest.raises(UserError, match="a ResNet has 'none' and 'tsm', not 'tokent1d'"):
        build(resnet, ("a",))
    resnet = replace(tiny(drop_out=0.1), model=resnet.model, data=DataConfig(resolution=224))
    with pytest.raises(UserError, match="RN50 is a ResNet: no such option for it"):
        build(resnet, ("a",))


def transformer_of(model: VideoCLIP) -> Transformer:
    found = model.get_submodule("visual.transformer")
    assert isinstance(found, Transformer)
    return found


def test_checkpointing_reaches_the_trunk() -> None:
    config = tiny()
    model = build(
        replace(config, train=replace(config.train, activation_checkpointing=True)), ("a",)
    )
    assert transformer_of(model).checkpointing
    assert not transformer_of(build(config, ("a",))).checkpointing
