"""Checkpoints read and loaded into modules: every name accounted for, every value to the bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import checkpoint_files as files
from checkpoint_files import FILES, GOLDEN, assert_same
from kineticlip.formats import (
    FORMATS,
    convert,
    fold_patch_bias,
    interpolate_positions,
    load_clip_state,
    load_into,
    read_checkpoint,
    round_like_clip,
    save_checkpoint,
)
from kineticlip.formats.files import Contents, read_contents
from kineticlip.formats.table import identify
from kineticlip.runtime.errors import UserError

Open = Callable[[str], Path]


@pytest.mark.parametrize("name", FILES)
def test_exactly_one_format_knows_a_file_and_accounts_for_every_name(
    sample: Open, name: str
) -> None:
    contents = read_contents(sample(name))
    matching = [f.name for f in FORMATS if f.detect(contents.tensors.keys(), contents.values)]
    assert matching == [FILES[name][0]]
    checkpoint = read_checkpoint(sample(name))
    assert checkpoint.format == FILES[name][0]
    assert {*checkpoint.renamed, *checkpoint.dropped} == contents.tensors.keys()
    assert checkpoint.tensors
    assert not any("module" in key or ".net." in key for key in checkpoint.tensors)


def test_openai_layouts_give_the_same_tensors(sample: Open) -> None:
    want = files.clip_vit()
    for name in (
        "openai_jit", "openai_state", "openai_safetensors", "open_clip_training",
        "open_clip_custom_text",
    ):  # fmt: skip
        assert_same(read_checkpoint(sample(name)).tensors, want)
    assert read_checkpoint(sample("open_clip_training")).metadata["epoch"] == 3
    dropped = set(read_checkpoint(sample("openai_jit")).dropped)
    counts = {"input_resolution", "context_length", "vocab_size"}
    assert dropped == {*counts, "transformer.resblocks.0.attn_mask"}


def test_text4vis_names_lose_the_wrappers_of_temporal_shift(sample: Open) -> None:
    shifted = read_checkpoint(sample("text4vis_vit_tsm"))
    plain = read_checkpoint(sample("text4vis_vit_plain"))
    assert shifted.tensors.keys() == plain.tensors.keys()
    assert shifted.metadata == {"epoch": 29, "temporal_module": "tsm"}
    assert plain.metadata == {"epoch": 29}
    assert "visual.layer2.1.conv1.weight" in read_checkpoint(sample("text4vis_rn_tsm")).tensors


def test_header_of_the_contrastive_layout_gets_its_prefix(sample: Open) -> None:
    tensors = read_checkpoint(sample("nce")).tensors
    want = {f"fusion_model.{n}": t for n, t in files.header_state().items()}
    assert_same(tensors, {**files.clip_vit(), **want})
    sentence = read_checkpoint(sample("bike_sentence")).tensors
    assert torch.equal(
        sentence["fusion_model.query_fc.2.bias"], files.sentence_state()["query_fc.2.bias"]
    )


def test_vitaclip_tower_is_joined_into_openai_names(sample: Open) -> None:
    source = files.vitaclip_state()
    tensors = read_checkpoint(sample("vitaclip")).tensors
    block = "visual.blocks.2.attn"
    joined = torch.cat([source[f"{block}.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(tensors["visual.transformer.resblocks.2.attn.in_proj_weight"], joined)
    assert torch.equal(tensors["visual.conv1.bias"], source["visual.patch_embed.proj.bias"])
    assert torch.equal(tensors["token_embedding.weight"], source["textual.token_embedding.weight"])
    summary = "blocks.1.summary_attn_layer"
    joined = torch.cat([source[f"visual.{summary}.{part}_proj.bias"] for part in "qkv"])
    assert torch.equal(tensors[f"prompts.{summary}.in_proj_bias"], joined)
    assert torch.equal(tensors["prompts.time_embed"], source["visual.time_embed"])


def test_evl_optimiser_is_dropped_on_purpose(sample: Open) -> None:
    checkpoint = read_checkpoint(sample("evl"))
    assert all(name.startswith("optimizer.state.") for name in checkpoint.dropped)
    assert len(checkpoint.dropped) == 153  # three tensors for each of 51 parameters
    assert len(checkpoint.tensors) == 51
    assert checkpoint.metadata["next_step"] == 2


def test_hugging_face_weights_give_open_clip_the_same_features(sample: Open) -> None:
    import open_clip

    theirs: Any = files.hugging_face_clip()
    state = load_clip_state(sample("hf_clip"))
    model = open_clip.model.CLIP(
        embed_dim=24,
        vision_cfg={"layers": 2, "width": 32, "patch_size": 16, "image_size": 32, "head_width": 16},
        text_cfg={"context_length": 77, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
        quick_gelu=True,
    ).eval()
    theirs.load_state_dict(torch.load(sample("hf_clip"), weights_only=True))
    load_into(model, state, what="hf_clip")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vision = theirs.visual_projection(theirs.vision_model(pixel_values=pixels).pooler_output)
        torch.testing.assert_close(model.encode_image(pixels), vision, atol=1e-5, rtol=1e-5)
        ids = torch.randint(1, 60, (2, 77), generator=torch.Generator().manual_seed(1))
        ids[:, 30] = 63  # end of text: the highest id, which both take the feature from
        hidden = theirs.text_model(input_ids=ids).last_hidden_state[:, 30]
        text = theirs.text_projection(hidden)
        torch.testing.assert_close(model.encode_text(ids), text, atol=1e-5, rtol=1e-5)


def test_unknown_and_ambiguous_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(9)}, path)
    with pytest.raises(UserError, match=r"no known format \(kineticlip, openai.*layer0\.weight"):
        read_checkpoint(path)
    names = {
        **dict.fromkeys(files.clip_vit(), torch.zeros(1)),
        "text_model.embeddings.x": torch.zeros(1),
        "vision_model.embeddings.x": torch.zeros(1),
    }
    with pytest.raises(UserError, match=r"several formats \(openai, hf_clip\)"):
        identify(Contents(kind="torch", tensors=names), "both.pt")


def test_a_name_without_a_rule_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save({**files.clip_vit(), "visual.adapter.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"format openai has no place for visual\.adapter\.weight"):
        read_checkpoint(path)


def test_clip_part_of_a_method_checkpoint(sample: Open) -> None:
    state = load_clip_state(sample("nce"))
    assert state.keys() == files.clip_vit().keys()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    with pytest.raises(UserError, match="format evl without CLIP's visual tower"):
        load_clip_state(sample("evl"))


def test_load_into_names_every_misfit_at_once_and_changes_nothing() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {"0.weight": torch.zeros(4, 5), "0.bias": torch.zeros(4), "2.bias": torch.zeros(1)}
    with pytest.raises(UserError) as error:
        load_into(module, tensors, what="w.pt")
    assert str(error.value) == (
        "w.pt does not fit Sequential: missing '1.weight'; missing '1.bias'; unexpected '2.bias'; "
        "'0.weight' is (4, 5), the model has (4, 3)"
    )
    assert_same(module.state_dict(), before)


def test_load_into_takes_named_exceptions() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    kept = module.state_dict()["1.weight"].clone()
    tensors = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4), "text.x": torch.zeros(1)}
    loaded = load_into(module, tensors, what="w", optional=[r"1\..*"], ignored=[r"text\..*"])
    assert loaded.kept == ("1.weight", "1.bias")
    assert loaded.ignored == ("text.x",)
    assert torch.equal(module.state_dict()["0.weight"], torch.ones(4, 3))
    assert torch.equal(module.state_dict()["1.weight"], kept)


def test_rounding_is_that_of_clip_load() -> None:
    official = json.loads((GOLDEN / "text4vis/clip_load_fp16_rounding.json").read_text())
    state = {name: torch.tensor([1.0 + 2.0**-13]) for names in official.values() for name in names}
    rounded = round_like_clip(state)
    changed = [name for name in state if not torch.equal(rounded[name], state[name])]
    assert sorted(changed) == sorted(official["rounded_to_fp16_on_clip_load"])
    assert all(tensor.dtype == torch.float32 for tensor in rounded.values())
    resnet = {name: torch.tensor([1.0 + 2.0**-13]) for name in files.clip_resnet()}
    kinds = {n for n, t in round_like_clip(resnet).items() if not torch.equal(t, resnet[n])}
    assert {"visual.layer1.0.downsample.0.weight", "visual.attnpool.c_proj.bias"} <= kinds
    assert not any("bn" in name or "positional" in name for name in kinds)


def test_patch_bias_moves_into_the_positions_of_the_patches() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(8, 3, 4, 4, generator=generator)
    bias, positions = torch.randn(8, generator=generator), torch.randn(5, 8, generator=generator)
    state = {
        "visual.conv1.weight": weight,
        "visual.conv1.bias": bias,
        "visual.positional_embedding": positions,
    }
    folded = fold_patch_bias(state)
    pixels = torch.randn(2, 3, 8, 8, generator=generator)

    def patches(bias: Tensor | None, positions: Tensor) -> Tensor:
        grid = nn.functional.conv2d(pixels, weight, bias, stride=4)
        return grid.flatten(2).transpose(1, 2) + positions[1:]

    new = folded["visual.positional_embedding"]
    torch.testing.assert_close(patches(None, new), patches(bias, positions))
    assert torch.equal(new[0], positions[0])
    assert torch.equal(state["visual.positional_embedding"], positions)


def test_positions_are_interpolated_only_when_asked(
    sample: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tensors = {**files.clip_vit()}
    name = "visual.positional_embedding"
    constant = torch.full_like(tensors[name], 0.25)
    constant[0] = 7
    larger = interpolate_positions({**tensors, name: constant}, 48)[name]  # patch 8: 4x4 -> 6x6
    assert larger.shape == (37, 128)
    assert torch.equal(larger[0], constant[0])
    torch.testing.assert_close(larger[1:], torch.full((36, 128), 0.25).half())
    assert "interpolated from a 4x4 to a 6x6 grid" in caplog.text
    assert torch.equal(interpolate_positions(tensors, 32)[name], tensors[name])
    with pytest.raises(UserError, match="no multiple of the patch size 8"):
        interpolate_positions(tensors, 50)
    with pytest.raises(UserError, match="tied to its resolution"):
        convert(sample("evl_finetuned"), tmp_path / "o.pth", to="evl", resolution=48)
    result = convert(sample("openai_state"), tmp_path / "o.pt", to="openai", resolution=48)
    assert result.notes == (f"{name} interpolated from 17 to 37 positions",)
    assert load_clip_state(tmp_path / "o.pt")[name].shape == (37, 128)


def test_interpolation_keeps_a_gradient_across_the_grid() -> None:
    rows = torch.arange(8.0).repeat_interleave(8)[:, None]
    tensors = {
        "visual.positional_embedding": torch.cat([torch.zeros(1, 1), rows]),
        "visual.conv1.weight": torch.zeros(1, 3, 4, 4),
    }
    grid = interpolate_positions(tensors, 64)["visual.positional_embedding"][1:].view(16, 16)
    torch.testing.assert_close(grid[:, 0], grid[:, 15])
    torch.testing.assert_close(grid[4:12, 0], (torch.arange(4.0, 12.0) + 0.5) / 2 - 0.5)


def test_own_files_say_so_in_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    shared = torch.arange(6.0)
    save_checkpoint(path, {"a": shared[:3], "b": shared[3:]}, {"epoch": "3"})
    checkpoint = read_checkpoint(path)
    assert checkpoint.metadata == {"format": "kineticlip", "epoch": "3"}
    assert_same(checkpoint.tensors, {"a": torch.arange(3.0), "b": torch.arange(3.0, 6.0)})


def test_source_names_of_goldens_are_those_of_the_official_files() -> None:
    """The samples above stand on official key lists; a drift of these would hide everything."""
    keys = json.loads((GOLDEN / "text4vis/checkpoint_keys.json").read_text())
    fusion = load_file(GOLDEN / "text4vis/fusion_transf.safetensors")
    assert {name for name, _ in keys["fusion_model (sim_header Transf adds)"]} == fusion.keys()
    vit = {name for name in files.clip_vit() if name.startswith("visual.")}
    assert {name for name, _ in keys["vit_plain"]} == {*vit, "logit_scale"}
