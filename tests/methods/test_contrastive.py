"""The contrastive baseline: the official losses and gradients, and the model around them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip.config import (
    ClassifierConfig,
    Config,
    ContrastiveConfig,
    DataConfig,
    ModelConfig,
    Text4VisConfig,
)
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.methods import METHODS
from kineticlip.methods.contrastive import METHOD, ContrastiveCLIP, build
from kineticlip.methods.nce import gather, matching_loss
from kineticlip.methods.text4vis import VideoCLIP
from kineticlip.models.temporal import TemporalTransformer
from kineticlip.models.text import text_tower
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.errors import UserError
from text4vis_golden import ARCHITECTURE, ATOL, FRAMES, VISION, arrays, tensors, under

NCE = {name: torch.from_numpy(array) for name, array in arrays("nce").items()}


def pretend_ranks(monkeypatch: pytest.MonkeyPatch, rank: int, others: list[Tensor]) -> None:
    """torch.distributed as process `rank` sees it; `others`: what each gather brings, in order."""
    waiting = iter(others)

    def all_gather(parts: list[Tensor], local: Tensor) -> None:
        everything = next(waiting)
        assert torch.equal(everything[rank], local) and not local.requires_grad
        for part, rows in zip(parts, everything, strict=True):
            part.copy_(rows)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: len(others[0]))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    monkeypatch.setattr("torch.distributed.all_gather", all_gather)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["NCE", "DS"])
def test_official_losses_and_gradients(
    name: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = {side: F.normalize(NCE[side], dim=-1) for side in ("image", "text")}
    pretend_ranks(monkeypatch, rank, [unit["image"], unit["text"], NCE["labels"]])
    image = NCE["image"][rank].clone().requires_grad_()
    text = NCE["text"][rank].clone().requires_grad_()
    scale = NCE["log_logit_scale"].clone().requires_grad_()
    videos, sentences = gather(F.normalize(image, dim=-1)), gather(F.normalize(text, dim=-1))
    labels = gather(NCE["labels"][rank])
    logits = scale.exp() * videos @ sentences.T
    torch.testing.assert_close(logits, NCE[f"rank{rank}/logits_per_image"])
    loss = matching_loss(logits, labels, dual=name == "DS")
    golden = under(f"rank{rank}/{name}/", NCE)
    assert abs(loss.item() - golden["loss_img_text_mean"][2].item()) < 1e-5
    loss.backward()
    assert image.grad is not None and text.grad is not None and scale.grad is not None
    torch.testing.assert_close(image.grad, golden["grad_image"], atol=1e-6, rtol=0)
    torch.testing.assert_close(text.grad, golden["grad_text"], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        scale.grad.double(), golden["grad_log_logit_scale"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["NCE", "DS"])
def test_one_process_gathers_nothing(name: str) -> None:
    image, text = NCE["image"][0], NCE["text"][0]
    assert gather(image) is image
    logits = NCE["log_logit_scale"].exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    found = matching_loss(logits, NCE["labels"][0], dual=name == "DS")
    assert abs(found.item() - NCE[f"single/{name}/loss_img_text_mean"][2].item()) < 1e-5


def official(**options: Any) -> ContrastiveCLIP:
    """The golden CLIP with both towers, and the tokens of its ten classes."""
    state = tensors("clip_vit_base")
    visual = VisionTransformer(VISION)
    visual.load_state_dict(under("visual.", state))
    header = TemporalTransformer(ARCHITECTURE.embed, ARCHITECTURE.header_heads)
    header.load_state_dict(under("fusion_model.", tensors("fusion_transf")))
    video = VideoCLIP(visual, header, embed=ARCHITECTURE.embed)
    with torch.no_grad():
        video.logit_scale.copy_(state["logit_scale"])
    tokens = tensors("case_text")["tokens"].long()
    tower = text_tower(ARCHITECTURE.text, state)
    return ContrastiveCLIP(video, ContrastiveConfig(**options), tower=tower, tokens=tokens).eval()


PIXELS = tensors("frames_vit")["frames_vit"].unflatten(0, (-1, FRAMES))


def test_logits_are_those_of_the_frozen_classifier() -> None:
    model = official()
    with torch.inference_mode():
        logits = model(PIXELS)
    torch.testing.assert_close(
        logits, tensors("case_vit_plain")["logits_Transf"], atol=ATOL, rtol=0
    )
    assert set(model.state_dict()) == set(tensors("clip_vit_base")) | set(tensors("fusion_transf"))


def test_classes_are_encoded_again_after_training() -> None:
    model = official()
    with torch.no_grad():
        before = model(PIXELS)
        model.text_projection.mul_(torch.linspace(0.5, 2, ARCHITECTURE.embed))
        assert torch.equal(model(PIXELS), before)  # kept while evaluating
        model.train().eval()
        assert not torch.allclose(model(PIXELS), before)


@pytest.mark.parametrize("loss", ["nce", "ds", "ce"])
def test_both_towers_learn(loss: str) -> None:
    model = official(loss=loss).train()
    labels = torch.tensor([7, 3])
    value, metrics = METHOD.loss(model, Batch(pixels=PIXELS, labels=labels, names=()))
    logits = tensors("case_vit_plain")["logits_Transf"]
    if loss == "ce":
        expected = F.cross_entropy(logits, labels)
        hits = logits.argmax(1) == labels
    else:
        expected = matching_loss(logits[:, labels], labels, dual=loss == "ds")
        hits = logits[:, labels].argmax(1) == torch.tensor([0, 1])
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)
    assert metrics["accuracy"] == hits.float().mean()
    value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_half_precision_model_keeps_its_mask() -> None:
    model = official().to(torch.bfloat16)
    with torch.inference_mode():
        logits = model(PIXELS)
    assert logits.dtype == torch.float32
    exact = tensors("case_vit_plain")["logits_Transf"]
    assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


def tiny(**options: Any) -> Config:
    return Config(
        method="contrastive",
        model=ModelConfig(arch="ViT-tiny-16", weights="random"),
        data=DataConfig(resolution=64),
        text4vis=Text4VisConfig(header_layers=1),
        contrastive=ContrastiveConfig(**options),
    )


def test_frozen_sentences_train_no_text_tower() -> None:
    names = ("red ball", "blue ball", "green ball")
    online, frozen = (
        METHODS["contrastive"].build(tiny(text=text), names).eval() for text in ("online", "frozen")
    )
    assert isinstance(online, ContrastiveCLIP) and isinstance(frozen, ContrastiveCLIP)
    pixels = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(online(pixels), frozen(pixels), atol=1e-5, rtol=0)
    lone = {name.split(".")[0] for name, _ in frozen.named_parameters()}
    assert lone == {"visual", "fusion_model", "logit_scale"}
    clip, new = METHOD.param_groups(online, tiny())
    assert clip["lr"] == pytest.approx(0.1 * new["lr"])
    assert len(clip["params"]) + len(new["params"]) == len(list(online.parameters()))
    fixed = build(tiny(train_visual=False), names)
    assert not any(parameter.requires_grad for parameter in fixed.visual.parameters())
    assert len(METHOD.param_groups(fixed, tiny())) == 2  # text tower and header still train

    video = VideoViews(
        name="a",
        label=0,
        images=pixels[0].unsqueeze(1),
        frame_index=torch.tensor([[0, 1, 2]]),
        crop_index=torch.tensor([0]),
        decoder="test",
        num_frames=3,
    )
    with torch.inference_mode():
        scores = METHOD.score(online, [video], 2)
        expected = (online(pixels[:1]) / online.logit_scale.exp() * 100).softmax(-1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_options_that_do_not_fit() -> None:
    config = replace(tiny(), classifier=ClassifierConfig(source="random_normal"))
    with pytest.raises(UserError, match="needs source text, one template"):
        build(config, ("a",))
    several = Batch(pixels=PIXELS, labels=torch.ones(2, 10), names=())
    with pytest.raises(UserError, match="several labels"):
        METHOD.loss(official(), several)
