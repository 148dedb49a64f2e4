"""Open-VCLIP, ViFi-CLIP and ActionCLIP against their formulas, written out."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from kineticlip.config import Config, DataConfig, ModelConfig, Text4VisConfig, override
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.methods import METHODS
from kineticlip.methods.openvclip import interpolate_weights, neighbouring
from kineticlip.models.prompts import ENSEMBLES
from kineticlip.models.text import encode_text, tokenize
from kineticlip.runtime.errors import UserError
from kineticlip_kernels.recompute import recomputed

NAMES = ("red ball", "blue ball", "rolling")


def config(method: str, *changes: str) -> Config:
    start = Config(
        method=method,
        model=ModelConfig(arch="ViT-tiny-16", weights="random"),
        data=DataConfig(num_frames=4, resolution=64),
        text4vis=Text4VisConfig(header_layers=1),
    )
    return override(start, ["classifier.template='{}'", *changes])


def built(method: str, *changes: str, names: tuple[str, ...] = NAMES) -> Any:
    return METHODS[method].build(config(method, *changes), names).eval()


def pixels(clips: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (clips, 4, 3, 64, 64), generator=generator).to(torch.uint8)


def batch() -> Batch:
    return Batch(pixels=pixels(3), labels=torch.tensor([0, 2, 0]), names=("a", "b", "c"))


def views(method: str) -> list[VideoViews]:
    images = pixels(3).flatten(0, 1).unsqueeze(1)  # [12, 1, 3, S, S]
    rows = torch.arange(12).unflatten(0, (3, 4))
    return [
        VideoViews(
            name="", label=0, images=images, frame_index=rows, decoder="", num_frames=12,
            crop_index=torch.zeros(1, dtype=torch.long),
        )
    ]  # fmt: skip


# Open-VCLIP -------------------------------------------------------------------------------------


def plain_neighbours(visual, clip: Tensor) -> Tensor:
    """One clip [T, 3, S, S]: every frame attends to the 3 N tokens around it, by a loop."""
    _, x = visual.ln_pre(visual.embed(clip))
    for block in visual.transformer.resblocks:
        y = F.layer_norm(x, x.shape[-1:], block.ln_1.weight, block.ln_1.bias)
        q, k, v = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
        rows = []
        for t in range(len(x)):
            around = [
                (k[s], v[s])
                if 0 <= s < len(x)
                else (torch.zeros_like(k[0]), torch.zeros_like(v[0]))
                for s in (t - 1, t, t + 1)
            ]
            keys, values = (torch.cat(parts) for parts in zip(*around, strict=True))
            heads = [part.unflatten(-1, (2, -1)).transpose(0, 1) for part in (q[t], keys, values)]
            scores = heads[0] @ heads[1].transpose(-1, -2) * heads[0].shape[-1] ** -0.5
            rows.append((scores.softmax(dim=-1) @ heads[2]).transpose(0, 1).flatten(1))
        x = x + block.attn.out_proj(torch.stack(rows))
        x = x + block.mlp(F.layer_norm(x, x.shape[-1:], block.ln_2.weight, block.ln_2.bias))
    _, x = visual.ln_post(x[:, 0])
    return F.normalize(x @ visual.proj, dim=-1).mean(dim=0)


def test_openvclip_frames_see_their_neighbours() -> None:
    model = built("openvclip")
    with torch.no_grad():
        found = model.encode_clips(pixels())
        expected = torch.stack([plain_neighbours(model.visual, clip) for clip in pixels()])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        alone = F.normalize(model.visual(pixels().flatten(0, 1)), dim=-1).view(2, 4, -1).mean(1)
        assert (found - alone).abs().max() > 1e-4
        logits = model.logit_scale.exp() * expected @ model.classifier.T
        torch.testing.assert_close(model(pixels()), logits, atol=1e-4, rtol=0)
        scores = METHODS["openvclip"].score(model, views("openvclip"), 5)
        mean = model(pixels(3)).mean(dim=0)
    torch.testing.assert_close(scores[0], mean.softmax(-1), atol=1e-5, rtol=0)


def test_openvclip_ends_are_zero() -> None:
    x = torch.arange(1.0, 7).view(6, 1, 1)
    assert neighbouring(x, 3)[:, :, 0].tolist() == [[0, 2], [1, 3], [2, 0], [0, 5], [4, 6], [5, 0]]


def test_openvclip_weights_are_drawn_back(tmp_path: Path) -> None:
    states = {}
    for name, seed in (("clip", 1), ("tuned", 2)):
        model = built("openvclip", f"seed={seed}")
        states[name] = dict(model.state_dict())
        save_file(states[name], tmp_path / f"{name}.safetensors", {"format": "kineticlip"})
    changes = (f"model.weights={tmp_path}/tuned.safetensors", "classifier.source=random_normal",
               f"openvclip.clip_weights={tmp_path}/clip.safetensors")  # fmt: skip
    mixed = built("openvclip", *changes, "openvclip.clip_share=0.25").state_dict()
    for name, tensor in mixed.items():
        if name.startswith("visual."):
            want = 0.75 * states["tuned"][name] + 0.25 * states["clip"][name]
            torch.testing.assert_close(tensor, want)
    for share, name in ((0.0, "tuned"), (1.0, "clip")):
        whole = built("openvclip", *changes, f"openvclip.clip_share={share}").state_dict()
        assert torch.equal(whole["visual.proj"], states[name]["visual.proj"])
    with pytest.raises(UserError, match=r"clip_share should be between 0 and 1, got 2"):
        interpolate_weights({}, {}, 2.0)
    with pytest.raises(UserError, match=r"clip_weights: 'a' is \(2,\), the tuned one \(3,\)"):
        interpolate_weights({"a": torch.ones(3)}, {"a": torch.ones(2)}, 0.5)


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Of every parameter; each must have one."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def pulled(tmp_path: Path, *changes: str) -> Any:
    """A tuned tower with another one to be pulled to."""
    for name, seed in (("clip", 1), ("tuned", 2)):
        state = dict(built("openvclip", f"seed={seed}").state_dict())
        state["logit_scale"] = torch.tensor(3.0 + seed)
        save_file(state, tmp_path / f"{name}.safetensors", {"format": "kineticlip"})
    files = (f"model.weights={tmp_path}/tuned.safetensors", "classifier.source=random_normal",
             f"openvclip.clip_weights={tmp_path}/clip.safetensors")  # fmt: skip
    settings = config("openvclip", *files, "openvclip.pull=0.5", *changes)
    model = METHODS["openvclip"].build(settings, NAMES).eval()
    assert METHODS["openvclip"].before_training(model, settings) == {}
    return model


@pytest.mark.parametrize("lean", [False, True])
def test_openvclip_pull_adds_the_gradient_at_mixed_weights(tmp_path: Path, lean: bool) -> None:
    """The second gradient is the one that another model, built of the mixture, has."""
    model = pulled(tmp_path, "openvclip.pull_shares=[0.25, 0.25]").train()
    with recomputed() if lean else contextlib.nullcontext():
        value, metrics = METHODS["openvclip"].loss(model, batch())
    value.backward()
    found = gradients_of(model)
    share = "openvclip.clip_share"
    expected, losses = {name: torch.zeros_like(grad) for name, grad in found.items()}, []
    for weight, more in ((1.0, 0.0), (0.5, 0.25)):
        other = pulled(tmp_path, "openvclip.pull=0", f"{share}={more}").train()
        with torch.no_grad():
            other.logit_scale.copy_(torch.tensor(5.0 - more))  # 4 in CLIP's file, 5 in the tuned
        loss, _ = METHODS["openvclip"].loss(other, batch())
        loss.backward()
        losses.append(float(loss.detach()))
        for name, gradient in gradients_of(other).items():
            expected[name] += weight * gradient
    assert float(metrics["pulled_loss"]) == pytest.approx(losses[1], abs=1e-4)
    assert float(value.detach()) == pytest.approx(losses[0] + 0.5 / 0.75 * losses[1], abs=1e-4)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(found[name], gradient, atol=2e-4 * scale, rtol=0, msg=name)
    assert torch.equal(model(pixels()), pulled(tmp_path)(pixels()))  # its own weights are whole


def test_openvclip_draws_a_share_for_every_batch(tmp_path: Path) -> None:
    model = pulled(tmp_path).train()
    torch.manual_seed(0)
    shares = [model.pull.draw() for _ in range(200)]
    assert 0 <= min(shares) < 0.05 and 0.55 < max(shares) <= 0.6
    assert not any("pull" in name for name in model.state_dict())
    with pytest.raises(UserError, match=r"pull_shares' should be from 0 to below 1, got 1.0"):
        pulled(tmp_path, "openvclip.pull_shares=[0.5, 1.0]")
    with pytest.raises(UserError, match=r"pull_shares: the lower share first"):
        pulled(tmp_path, "openvclip.pull_shares=[0.6, 0.5]")
    for change in ("train.zero_stage=3", "train.activation_checkpointing=true"):
        with pytest.raises(UserError, match=r"openvclip.pull: without"):
            pulled(tmp_path, change)


def test_openvclip_vectors_do_not_decay(tmp_path: Path) -> None:
    groups = METHODS["openvclip"].param_groups(pulled(tmp_path), config("openvclip"))
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("matrices", 0.2), ("vectors", 0.0)]
    assert {p.dim() for p in groups[1]["params"]} == {0, 1}


# ViFi-CLIP --------------------------------------------------------------------------------------


def test_vificlip_is_cosine_of_means() -> None:
    model = built("vificlip")
    with torch.no_grad():
        frames = model.visual(pixels(3).flatten(0, 1)).unflatten(0, (3, 4))
        videos = F.normalize(frames.mean(dim=1), dim=-1)
        text = F.normalize(encode_text(model, tokenize(NAMES)), dim=-1)
        logits = model.logit_scale.exp() * videos @ text.T
        torch.testing.assert_close(model(pixels(3)), logits, atol=1e-4, rtol=0)
        scores = METHODS["vificlip"].score(model, views("vificlip"), 5)
    torch.testing.assert_close(scores[0], logits.softmax(-1).mean(0), atol=1e-5, rtol=0)
    value, metrics = METHODS["vificlip"].loss(model.train(), batch())
    torch.testing.assert_close(value, F.cross_entropy(logits, batch().labels), atol=1e-4, rtol=0)
    value.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert 0 <= metrics["accuracy"] <= 1


def test_vificlip_trains_the_towers_it_is_told_to() -> None:
    image = built("vificlip", "vificlip.train_text=false")
    assert not any(name.startswith("transformer.") for name, _ in image.named_parameters())
    text = built("vificlip", "vificlip.train_visual=false")
    trained = {n for n, p in text.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith("visual.") for name in trained)
    with pytest.raises(UserError, match="nothing would train"):
        built("vificlip", "vificlip.train_visual=false", "vificlip.train_text=false")
    groups = METHODS["vificlip"].param_groups(built("vificlip"), config("vificlip"))
    assert [group["weight_decay"] for group in groups] == [0.2]


# ActionCLIP -------------------------------------------------------------------------------------


def test_actionclip_averages_the_templates_softmax() -> None:
    model = built("actionclip")
    assert len(ENSEMBLES["actionclip"]) == len(set(ENSEMBLES["actionclip"])) == 16
    with torch.no_grad():
        frames = model.visual(pixels(3).flatten(0, 1)).unflatten(0, (3, 4))
        videos = model.fusion_model(frames).mean(dim=1)
        mean = F.normalize(videos.mean(dim=0), dim=-1)
        expected = torch.zeros(len(NAMES))
        for template in ENSEMBLES["actionclip"]:
            tokens = tokenize([template.replace("{}", name) for name in NAMES])
            rows = F.normalize(encode_text(model, tokens), dim=-1)
            expected += (100 * rows @ mean).softmax(dim=-1) / 16
        scores = METHODS["actionclip"].score(model, views("actionclip"), 7)
    torch.testing.assert_close(scores[0], expected, atol=1e-5, rtol=0)


def test_actionclip_loss_has_several_positives() -> None:
    model = built("actionclip", "actionclip.templates=['{}']").train()
    value, _ = METHODS["actionclip"].loss(model, batch())
    with torch.no_grad():
        frames = model.visual(pixels(3).flatten(0, 1)).unflatten(0, (3, 4))
        videos = F.normalize(model.fusion_model(frames).mean(dim=1), dim=-1)
        text = F.normalize(encode_text(model, tokenize(NAMES))[[0, 2, 0]], dim=-1)
        logits = model.logit_scale.exp() * videos @ text.T
        target = torch.tensor([[10.0, 0, 10], [0, 10, 0], [10, 0, 10]]).softmax(dim=-1)
        sides = [
            (target * (target.log() - side.log_softmax(dim=-1))).sum() / 3
            for side in (logits, logits.T)
        ]
    torch.testing.assert_close(value, sum(sides) / 2, atol=1e-4, rtol=0)
    value.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    rates = [g["lr"] for g in METHODS["actionclip"].param_groups(model, config("actionclip"))]
    assert rates == [5e-6, 5e-5]


def test_actionclip_draws_a_template_for_each_clip() -> None:
    model = built("actionclip").train()
    values = set()
    for seed in range(3):
        torch.manual_seed(seed)
        values.add(round(float(METHODS["actionclip"].loss(model, batch())[0].detach()), 6))
    assert len(values) == 3
    with pytest.raises(UserError, match=r"actionclip\.templates: there is none"):
        built("actionclip", "actionclip.templates=[]")
    several = Batch(pixels=pixels(1), labels=torch.ones(1, 3), names=("a",))
    with pytest.raises(UserError, match="several labels"):
        METHODS["actionclip"].loss(model, several)
