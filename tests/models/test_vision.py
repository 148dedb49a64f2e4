"""The vision trunk: open_clip's numbers, the official Text4Vis variants, and the hooks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip.data.statistics import CLIP_STATISTICS
from kineticlip.models.architectures import (
    ResNetShape,
    VisionShape,
    architecture,
    known,
    recognise,
)
from kineticlip.models.temporal import TEMPORAL_MODULES, TemporalTransformer
from kineticlip.models.vision import Dropouts, VisionTransformer
from kineticlip.runtime.errors import UserError
from text4vis_golden import ARCHITECTURE, ATOL, FRAMES, VISION, tensors, under

SMALL = VisionShape(
    resolution=16, patch=4, width=32, layers=3, heads=2, embed=24, mlp_width=64
)  # N = 17


def seeded(build: type[VisionTransformer] = VisionTransformer, **options: Any) -> VisionTransformer:
    torch.manual_seed(3)
    return build(SMALL, **options).double().eval()


def clip_statistics() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3, 1, 1] of CLIP's pixels."""
    return (
        torch.tensor(CLIP_STATISTICS.mean).view(3, 1, 1),
        torch.tensor(CLIP_STATISTICS.std).view(3, 1, 1),
    )


def images(count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


# ViT-L's other blocks repeat these; whole, it differs by 2.9e-6 and takes ten seconds.
@pytest.mark.parametrize(
    ("name", "layers"),
    [("ViT-B-32", 12), ("ViT-B-16", 12), ("ViT-L-14", 6), ("ViT-L-14-336", 4)],
)
def test_same_embedding_as_open_clip(name: str, layers: int) -> None:
    config = open_clip.get_model_config(f"{name}-quickgelu")
    config["vision_cfg"]["layers"] = layers
    with torch.device("meta"):
        reference = open_clip.CLIP(**config).visual.eval()
    # One stretch of random numbers serves every tensor: drawing 300 million takes seconds.
    noise = torch.randn(5_000_000, generator=torch.Generator().manual_seed(5))
    state = {}
    for key, value in reference.state_dict().items():
        fan_in = value[0].numel() if value.ndim > 1 else value.numel()
        norm = 1.0 if "ln_" in key and key.endswith("weight") else 0.0
        state[key] = norm + noise[: value.numel()].view(value.shape) * fan_in**-0.5
    reference.load_state_dict(state, assign=True)
    with torch.device("meta"):
        tower = VisionTransformer(
            VisionShape(**{**vars(architecture(name).vision), "layers": layers})
        ).eval()
    tower.load_state_dict(state, assign=True)

    side = tower.shape.resolution
    pixels = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    mean, std = clip_statistics()
    normalised = (pixels / 255 - mean) / std
    with torch.inference_mode():
        expected, found = reference(normalised), tower(pixels)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", ["-quickgelu", ""])
def test_table_is_open_clips(suffix: str) -> None:
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "RN50", "RN101", "RN50x4",
                 "RN50x16", "RN50x64"):  # fmt: skip
        config = open_clip.get_model_config(name + suffix)
        model = architecture(name if suffix else f"{name}-gelu")
        vision, text = config["vision_cfg"], config["text_cfg"]
        assert (model.vision.resolution, model.vision.width, model.embed, model.vision.embed) == (
            vision["image_size"], vision["width"], config["embed_dim"], config["embed_dim"],
        )  # fmt: skip
        layers = model.vision.layers
        assert (list(layers) if isinstance(layers, tuple) else layers) == vision["layers"]
        assert getattr(model.vision, "patch", None) == vision["patch_size"]
        assert (model.text.width, model.text.heads, model.text.layers) == (
            text["width"], text["heads"], text["layers"],
        )  # fmt: skip
        activation = "quick_gelu" if suffix else "gelu"
        assert model.text.activation == activation
        assert isinstance(model.vision, ResNetShape) or model.vision.activation == activation


def test_names_of_architectures() -> None:
    assert architecture("ViT-L/14@336px") == architecture("ViT-L-14-336")
    assert architecture("ViT-L/14-336px") == architecture("ViT-L-14-336")
    huge = architecture("ViT-H-14").vision
    assert isinstance(huge, VisionShape)
    assert (huge.width, huge.heads, huge.layers, huge.activation) == (1280, 16, 32, "gelu")
    assert architecture("ViT-tiny-16").vision.resolution == 64
    assert {"ViT-tiny-16", "ViT-bigG-14", "RN50x64"} <= set(known())
    with pytest.raises(UserError, match="Did you mean 'ViT-B-16'"):
        architecture("ViT-B-17")
    with pytest.raises(UserError, match="not a plain CLIP ViT"):
        architecture("ViT-L-14-CLIPA")


def test_recognises_a_state_dict() -> None:
    shape = architecture("ViT-B-16").vision
    assert isinstance(shape, VisionShape)
    with torch.device("meta"):
        tower = VisionTransformer(shape)
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    assert recognise(state) == "ViT-B-16"
    assert recognise(tensors("clip_vit_base")) is None


@pytest.mark.parametrize("case", ["plain", "tokenshift", "tokent1d", "tsm", "joint", "T1"])
def test_official_variants(case: str) -> None:
    frames = 1 if case == "T1" else FRAMES
    golden = tensors(f"case_vit_{case}")
    module = TEMPORAL_MODULES.get(case)
    tower = VisionTransformer(
        VISION,
        control_point=partial(module, frames=frames) if module else None,
        joint_frames=frames if case == "joint" else 0,
    ).eval()
    extra = under("weights.visual.", golden)
    assert bool(extra) == (case in ("tokent1d", "joint"))
    tower.load_state_dict({**under("visual.", tensors("clip_vit_base")), **extra})
    pixels = tensors("frames_vit")["frames_vit"][: 3 if case == "T1" else None]
    with torch.inference_mode():
        found = tower(pixels)
        every_token = tower(pixels, tap=lambda *_: None)
    torch.testing.assert_close(found, golden["frame_embeddings"], atol=ATOL, rtol=0)
    torch.testing.assert_close(every_token, found, atol=1e-5, rtol=0)


def test_token_convolution_starts_as_the_shift() -> None:
    x = torch.randn(8, 5, 32)
    conv, shifted = TEMPORAL_MODULES["tokent1d"](32, 4), TEMPORAL_MODULES["tokenshift"](32, 4)
    assert torch.equal(conv(x), shifted(x))
    assert not torch.equal(conv(x), x)


def test_temporal_transformer() -> None:
    golden = tensors("case_fusion_only")
    header = TemporalTransformer(ARCHITECTURE.embed, ARCHITECTURE.header_heads)
    header.load_state_dict(under("fusion_model.", tensors("fusion_transf")))
    with torch.inference_mode():
        y = header(golden["x"]).mean(1)
        torch.testing.assert_close(y, golden["y_Transf"], atol=ATOL, rtol=0)
        header.frame_position_embeddings.weight.zero_()
        small = header(golden["x_small"]).mean(1)  # only right with eps 1e-12
        torch.testing.assert_close(small, golden["y_small_pos_zero"], atol=ATOL, rtol=0)


def test_temporal_transformer_starts_as_the_official_one() -> None:
    torch.manual_seed(0)
    header = TemporalTransformer(128, 2, layers=2)
    assert header.frame_position_embeddings.weight.shape == (77, 128)
    for name, parameter in header.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert torch.equal(parameter, torch.ones(128)), name
        elif "in_proj" in name:  # xavier: uniform within sqrt(6 / (D + 3 D))
            assert 0.95 < parameter.abs().max() / (6 / 512) ** 0.5 <= 1, name
        else:
            assert 0.019 < parameter.std() < 0.021, name


def test_pixels_are_normalised_inside() -> None:
    tower = seeded()
    mean, std = clip_statistics()
    floats = (images().double() / 255 - mean) / std
    torch.testing.assert_close(tower(images()), tower(floats), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="8x16 pixels; this tower takes 16x16"):
        tower(images()[..., :8])


def test_tower_made_on_the_meta_device_loads() -> None:
    tower = seeded()
    with torch.device("meta"):
        loaded = VisionTransformer(SMALL)
    loaded.load_state_dict(tower.state_dict(), assign=True)
    torch.testing.assert_close(loaded(images()), tower(images()), atol=1e-6, rtol=0)


def test_tap_sees_the_attention_and_the_stream() -> None:
    tower, seen = seeded(), []
    tower(images(), tap=lambda *values: seen.append(values))
    assert [block for block, *_ in seen] == [0, 1, 2]
    for (_, _, _, _, before), (index, q, k, v, out) in pairwise(seen):
        block = tower.blocks[index]
        assert q.shape == (6, 17, 2, 16) and out.shape == (6, 17, 32)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = before + block.attn.out_proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, x + block.mlp(block.ln_2(x)[1]))


def test_offset_is_added_before_ln_pre() -> None:
    tower, offset = seeded(), torch.randn(1, 17, 32, dtype=torch.float64)
    expected = tower(images(), offset=offset)
    with torch.no_grad():
        tower.positional_embedding.add_(offset[0])
    torch.testing.assert_close(tower(images()), expected)
    assert not torch.allclose(tower(images(), offset=offset), expected)


def token_sources(block: int, x: Tensor) -> Sequence[Tensor]:
    """One prompt for all images, and one token for every pair of images."""
    return [torch.full((1, 2, 32), 0.1 * (block + 1)).to(x), x[::2, :1] * 2]


def test_token_sources_are_keys_and_values_only() -> None:
    tower, seen = seeded(), []
    found = tower(images(), sources=token_sources)
    full = tower(images(), sources=token_sources, tap=lambda *values: seen.append(values))
    torch.testing.assert_close(found, full)  # the class token alone against all tokens

    # The same as tokens that stand in the sequence, attended to and then dropped.
    _, x = tower.ln_pre(tower.embed(images()))
    for index, block in enumerate(tower.blocks):
        prompt, shared = token_sources(index, x)
        long = torch.cat([x, prompt.expand(6, -1, -1), shared.repeat_interleave(2, 0)], dim=1)
        x, update, _ = block(long)
        x = (x + update)[:, :17]
        torch.testing.assert_close(seen[index][4], x)


def test_ready_keys_and_values_stay_in_the_softmax() -> None:
    tower = seeded()

    def sources(block: int, x: Tensor) -> Sequence[object]:
        return [lambda k, v: (torch.zeros_like(k), torch.zeros_like(v))]

    seen: list[Tensor] = []
    tower(images(), tap=lambda _, q, k, v, out: seen.extend((q, k, v, out)), sources=sources)
    q, k, v, out = seen[:4]
    scores = torch.einsum("mnhk,mshk->mhns", q, k) * 16**-0.5
    weights = F.pad(scores, (0, 17)).softmax(-1)[..., :17]  # zero keys: e^0 each
    mixed = torch.einsum("mhns,mshk->mnhk", weights, v).flatten(2)
    _, x = tower.ln_pre(tower.embed(images()))
    x = x + tower.blocks[0].attn.out_proj(mixed)
    torch.testing.assert_close(out, x + tower.blocks[0].mlp(tower.blocks[0].ln_2(x)[1]))
    torch.testing.assert_close(
        tower(images(), sources=sources), tower(images(), sources=sources, tap=lambda *_: None)
    )


def test_checkpointing_changes_no_gradient() -> None:
    plain, calls = seeded(), []

    def sources(block: int, x: Tensor) -> Sequence[Tensor]:
        calls.append(block)
        return token_sources(block, x)

    plain(images(), sources=sources).square().sum().backward()
    assert calls == [0, 1, 2]
    recomputed = seeded()
    recomputed.transformer.checkpointing = True
    recomputed(images(), sources=sources).square().sum().backward()
    assert len(calls) == 9  # forward, and once more for the backward
    for (name, one), (_, other) in zip(
        plain.named_parameters(), recomputed.named_parameters(), strict=True
    ):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_stochastic_depth_drops_whole_rows() -> None:
    tower = seeded(dropouts=Dropouts(paths=0.5))
    assert [block.drop_out for block in tower.blocks] == [0.0, 0.25, 0.5]
    assert not any(block.attn.drop_out for block in tower.blocks)  # a rate of its own
    assert torch.equal(tower(images()), seeded()(images()))  # nothing is dropped in evaluation
    torch.manual_seed(0)
    update = torch.randn(400, 17, 32)
    dropped = tower.train().blocks[2]._drop_path(update)
    kept = dropped.flatten(1).any(1)
    assert 150 < kept.sum() < 250
    torch.testing.assert_close(dropped[kept], 2 * update[kept])
    assert not torch.equal(tower(images()), tower(images()))


def test_attention_dropout_reaches_the_sources() -> None:
    tower = seeded(dropouts=Dropouts(attention=0.5)).train()
    assert [block.attn.drop_out for block in tower.blocks] == [0.0, 0.25, 0.5]
    assert not any(block.drop_out for block in tower.blocks)
    qkv = torch.randn(4, 17, 3, 2, 16, dtype=torch.float64)
    attention = tower.blocks[2].attn
    pairs = [(qkv[::2, :5, 1], qkv[::2, :5, 2])]
    expected = attention.attend(qkv, sources=pairs, impl=attention.impl)
    torch.manual_seed(0)
    mean = torch.stack([attention._dropped(qkv, pairs) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.1, rtol=0)  # unbiased; 3000 draws
