"""Vita-CLIP against the plain formulation of its mathematics, and its place in the loops."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip.commands.parity.vitaclip.training import Accumulating
from kineticlip.config import (
    ClassifierConfig,
    Config,
    DataConfig,
    ModelConfig,
    VitaConfig,
    override,
)
from kineticlip.data.batch import Batch, VideoViews
from kineticlip.formats import convert, read_checkpoint
from kineticlip.methods import METHODS
from kineticlip.methods.clips import distinct_clips
from kineticlip.methods.prompts_text import Placeholders, TextPrompts
from kineticlip.methods.vitaclip import METHOD, VitaCLIP, build
from kineticlip.models.classifier import Classifier, save_classifier
from kineticlip.models.text import tokenize
from kineticlip.runtime.errors import UserError

NAMES = ("red ball", "blue_ball", "rolling")


def config(**changes: Any) -> Config:
    settings = {"frames": 4, "weights": "random", **changes}
    return Config(
        method="vitaclip",
        model=ModelConfig(arch="ViT-tiny-16", weights=str(settings.pop("weights"))),
        data=DataConfig(num_frames=int(str(settings.pop("frames"))), resolution=64),
        classifier=ClassifierConfig(template="{}"),
        vitaclip=VitaConfig(**{"global_prompts": 3, "context": 4, **settings}),
    )


def made(names: tuple[str, ...] = NAMES, **changes: Any) -> VitaCLIP:
    """A random model whose prompts matter: drawn wide, not with the official 0.02."""
    model = build(config(**changes), names)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("prompts.", "prompt_learner.")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pixels(clips: int = 2, frames: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (clips, frames, 3, 64, 64), generator=generator).to(torch.uint8)


def attend(block, x: Tensor, heads: int) -> Tensor:
    """Plain multi-head attention over every token of x [M, N, D]."""
    q, k, v = F.linear(x, block.in_proj_weight, block.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return block.out_proj((weights @ v).transpose(1, 2).flatten(2))


def norm(layer, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)


def plain(model: VitaCLIP, clips: Tensor) -> Tensor:
    """Prompts concatenated to the tokens, carried through whole blocks and cut off again."""
    visual: Any = model.visual
    prompts, frames = model.prompts, model.prompts.frames
    images, heads, steps = clips.flatten(0, 1), visual.shape.heads, clips.shape[1]
    rows = F.interpolate(prompts.time_embed.T[None], size=steps, mode="nearest")[0].T
    x = visual.embed(images) + rows.repeat(len(clips), 1)[:, None]
    x = norm(visual.ln_pre, x)
    for index, block in enumerate(visual.transformer.resblocks):
        extra = []
        if prompts.groups:
            own: Any = prompts.blocks[index]
            first = own.cls_proj(x[:, 0]).unflatten(0, (-1, frames))
            if own.local:
                extra.append((own.local_prompts + first).repeat_interleave(frames, dim=0))
            if own.summary:
                mixed = attend(own.summary_attn_layer, norm(own.summary_ln, first), heads)
                extra.append((first + mixed).flatten(0, 1)[:, None])
        if prompts.has_global:
            extra.append(prompts.global_prompts[index].expand(len(x), -1, -1))
        whole = torch.cat([x, *extra], dim=1)
        whole = whole + attend(block.attn, norm(block.ln_1, whole), heads)
        whole = whole + block.mlp(norm(block.ln_2, whole))
        x = whole[:, : x.shape[1]]
    embeddings = norm(visual.ln_post, x[:, 0]) @ visual.proj
    return embeddings.unflatten(0, (len(clips), -1)).mean(dim=1)


PARTS = [
    {},
    {"summary": False},
    {"local_prompts": False},
    {"global_prompts": 0},
    {"summary": False, "local_prompts": False},
    {"summary": False, "local_prompts": False, "global_prompts": 0},
]


@pytest.mark.parametrize("off", PARTS, ids=str)
def test_keys_and_values_are_all_that_prompts_need(off: dict[str, Any]) -> None:
    model = made(**off)
    with torch.no_grad():
        expected = plain(model, pixels())
        torch.testing.assert_close(model.encode_clips(pixels()), expected, atol=2e-5, rtol=0)
        if off != PARTS[0]:
            everything = made().encode_clips(pixels())
            assert (everything - expected).abs().max() > 1e-3


def test_longer_clips_are_cut_into_groups() -> None:
    model = made()
    with torch.no_grad():
        found = model.encode_clips(pixels(frames=8))
        torch.testing.assert_close(found, plain(model, pixels(frames=8)), atol=2e-5, rtol=0)
        alone = model.encode_clips(pixels(frames=8)[1:])
    torch.testing.assert_close(found[1:], alone, atol=2e-5, rtol=0)
    only_global = made(summary=False, local_prompts=False)
    with torch.no_grad():
        odd = only_global.encode_clips(pixels(frames=3))
        torch.testing.assert_close(odd, plain(only_global, pixels(frames=3)), atol=2e-5, rtol=0)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("per_class", [True, False])
def test_text_is_the_whole_prompt_through_77_positions(position: str, per_class: bool) -> None:
    model: Any = made(position=position, per_class=per_class)
    learner = model.prompt_learner
    tokens = tokenize([f"X X X X {name.replace('_', ' ')}." for name in NAMES])
    embedded = model.token_embedding(tokens)
    context = learner.ctx.expand(len(NAMES), 4, -1)
    rows = []
    for row, words, length in zip(embedded, context, (2, 2, 1), strict=True):
        name, rest = row[5 : 5 + length], row[5 + length :]
        parts = {
            "end": [words, name], "front": [name, words], "middle": [words[:2], name, words[2:]],
        }[position]  # fmt: skip
        rows.append(torch.cat([row[:1], *parts, rest]))
    x = torch.stack(rows) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    expected = x[torch.arange(3), tokens.argmax(dim=-1)] @ model.text_projection
    with torch.no_grad():
        torch.testing.assert_close(model.text_features(), expected, atol=2e-5, rtol=0)


def test_micro_batches_share_their_text_features(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, split = made(), made()
    labels = torch.tensor([0, 2, 1, 1])
    clips = pixels(4)
    calls: list[bool] = []
    original = split.text_features

    def noted() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return original()

    monkeypatch.setattr(split, "text_features", noted)
    first = Accumulating(whole, 1).backward(clips, labels)
    assert Accumulating(split, 4).backward(clips, labels) == pytest.approx(first, abs=1e-5)
    assert calls == [False, True]  # once for four micro-batches, once more with gradients
    for (name, one), (_, other) in zip(
        whole.named_parameters(), split.named_parameters(), strict=True
    ):
        assert (one.grad is None) == (other.grad is None) == (not one.requires_grad), name
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, atol=2e-5, rtol=1e-3, msg=name)
    assert split._gradient is None and split._features is None


def test_what_trains() -> None:
    model = made()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = {name.split(".")[-1] if "summary" not in name else "summary" for name in trained}
    assert kinds == {
        "logit_scale",
        "ctx",
        "time_embed",
        "global_prompts",
        "local_prompts",
        "summary",
    }
    more = {name for name, p in made(train_cls_proj=True).named_parameters() if p.requires_grad}
    assert {name.split(".")[-2] for name in more - trained} == {"cls_proj"}
    groups = METHOD.param_groups(model, override(Config(), ["optim.lr=4e-4"]))
    assert [(group["lr"], len(group["params"])) for group in groups] == [(4e-4, len(trained))]


def test_evaluation_encodes_the_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    calls: list[None] = []
    original = model.text_features

    def counted() -> Tensor:
        calls.append(None)
        return original()

    monkeypatch.setattr(model, "text_features", counted)
    with torch.inference_mode():
        first, second = model(pixels()), model(pixels())
    assert len(calls) == 1 and torch.equal(first, second)
    model.train().eval()
    with torch.inference_mode():
        model(pixels())
    assert len(calls) == 2


def views(seed: int, clips: list[list[int]], crops: list[int], name: str = "v") -> VideoViews:
    distinct = max(max(row) for row in clips) + 1
    images = pixels(distinct, max(crops) + 1, seed)
    return VideoViews(
        name=name, label=0, images=images, frame_index=torch.tensor(clips),
        crop_index=torch.tensor(crops), decoder="test", num_frames=distinct,
    )  # fmt: skip


def test_scores_average_probabilities_and_repeat_no_clip() -> None:
    model = made()
    videos = [
        views(1, [[0, 1, 2, 3], [1, 2, 3, 4]], [0, 1, 0]),
        views(2, [[0, 1, 1, 1], [0, 1, 1, 1]], [0, 0, 0]),  # short and square: one clip
    ]
    assert [len(distinct_clips(video)[0]) for video in videos] == [4, 1]
    with torch.inference_mode():
        scores = METHOD.score(model, videos, 9)
        for row, video in zip(scores, videos, strict=True):
            expected = model(video.clips()).softmax(dim=-1).mean(dim=0)
            torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-5)
        model.visual.to(torch.bfloat16)  # as evaluation in bf16 does
        low = METHOD.score(model, videos, 9)
    torch.testing.assert_close(low, scores, atol=0.1, rtol=0)


def official(model: VitaCLIP, path: Path) -> str:
    from safetensors.torch import save_file

    own = path.with_suffix(".own.safetensors")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, own, {"format": "kineticlip"})
    convert(own, path, to="vitaclip")
    return str(path)


def test_official_files_come_back_to_the_bit(tmp_path: Path) -> None:
    model = made()
    path = official(model, tmp_path / "vita.pth")
    names = read_checkpoint(path).tensors
    assert "prompt_learner.token_suffix" in names
    again = build(config(weights=path), NAMES).eval()
    assert again.untrained == ()
    with torch.inference_mode():
        torch.testing.assert_close(again(pixels()), model(pixels()), atol=1e-5, rtol=0)
        longer = build(config(weights=path, frames=8), NAMES).eval()
        assert longer.prompts.frames == 4
        assert longer(pixels(frames=8)).shape == (2, 3)


def test_shared_words_move_to_new_classes(tmp_path: Path) -> None:
    model = made(per_class=False)
    path = official(model, tmp_path / "vita.pth")
    others = ("swimming", "red ball")
    again = build(config(weights=path, per_class=False), others).eval()
    with torch.inference_mode():
        torch.testing.assert_close(again.classifier[1], model.classifier[0], atol=1e-5, rtol=0)


def test_class_names_alone_score_any_classes(tmp_path: Path) -> None:
    path = official(made(), tmp_path / "vita.pth")
    rows = Classifier(torch.randn(2, 128), ("a", "b"))
    save_classifier(rows, tmp_path / "rows.safetensors")
    settings = config(weights=path, text="classifier")
    settings = replace(
        settings, classifier=ClassifierConfig(source=str(tmp_path / "rows.safetensors"))
    )
    model = build(settings, ("b", "a")).eval()
    with torch.inference_mode():
        torch.testing.assert_close(
            model.classifier, F.normalize(rows.matrix[[1, 0]], dim=-1), atol=1e-6, rtol=0
        )
        assert model(pixels()).shape == (2, 2)


def test_context_starts_as_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = build(config(context_words="a_video_of"), NAMES)
    tokens = tokenize(["a video of"])[0, 1:4]
    assert model.prompt_learner is not None
    table = model.get_parameter("token_embedding.weight")
    assert torch.equal(model.prompt_learner.ctx, table[tokens])
    assert "shared by all classes" in caplog.text
    # a word of several tokens: what the first cannot hold stays in the prompt
    rows = Placeholders.of(["x"], context=9, words="abseiling now")
    assert rows.context == 2
    assert rows.tokens[0, 1:5].tolist() == tokenize(["abseiling now"])[0, 1:5].tolist()


WRONG = [
    ({"frames": 6}, NAMES, r"data\.num_frames: .* multiple of 4, not on 6"),
    ({"context": 5}, NAMES, r"vitaclip\.context: .* has 4 words, not 5"),
    ({"per_class": False}, NAMES, r"vitaclip\.per_class: .* has words of every class"),
    ({"global_prompts": 2}, NAMES, r"vitaclip\.global_prompts: .* has 3, not 2"),
    ({}, NAMES[:2], r"data\.labels: .* for 3 other classes.* vitaclip\.text=classifier"),
    ({}, (*NAMES[:2], "crawling"), r"data\.labels: "),
]


@pytest.mark.parametrize(("changes", "names", "problem"), WRONG, ids=[w[2][:24] for w in WRONG])
def test_what_does_not_go_with_a_checkpoint(
    tmp_path: Path, changes: dict[str, object], names: tuple[str, ...], problem: str
) -> None:
    path = official(made(), tmp_path / "vita.pth")
    with pytest.raises(UserError, match=problem) as caught:
        build(config(weights=path, **changes), names)
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"vitaclip\.position.*'end', 'middle' or 'front', got 'up'"
    ):
        override(config(), ["vitaclip.position=up"])
    with pytest.raises(UserError, match=r"data\.resolution: ViT-tiny-16 takes 64 px, not 96"):
        build(override(config(), ["data.resolution=96"]), NAMES)
    with pytest.raises(UserError, match=r"ResNet; Vita-CLIP needs a ViT"):
        build(override(config(), ["model.arch=RN50", "data.resolution=224"]), NAMES)
    with pytest.raises(UserError, match=r"words but 4 tokens; position front"):
        build(config(context_words="abseiling now", position="front"), NAMES)
    with pytest.raises(UserError, match=r"trained without; turn it off"):
        build(config(weights=official(made(summary=False), tmp_path / "v.pth")), NAMES)
    batch = Batch(pixels=pixels(1), labels=torch.ones(1, 3), names=("a",))
    with pytest.raises(UserError, match="several labels"):
        METHOD.loss(made(), batch)


def test_clip_weights_leave_the_prompts_untrained() -> None:
    assert METHODS["vitaclip"] is METHOD and METHOD.pipeline == "evl"
    assert made().untrained == ("visual", "prompts", "prompt_learner")
    one, same = build(config(), NAMES), build(config(), NAMES)
    for (name, first), (_, second) in zip(
        one.named_parameters(), same.named_parameters(), strict=True
    ):
        assert torch.equal(first, second), name
    bound = (6 / (3 * 16**2 + 128)) ** 0.5
    assert 0.9 * bound < float(one.prompts.global_prompts.detach().abs().max()) <= bound
    assert isinstance(one.prompt_learner, TextPrompts)
    assert 0.015 < float(one.prompt_learner.ctx.detach().std()) < 0.025
