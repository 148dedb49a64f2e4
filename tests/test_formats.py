"""Checkpoints in and out: every name accounted for, every value to the bit, nothing executed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import checkpoint_files as files
from checkpoint_files import FILES, GOLDEN
from kineticlip.errors import UserError
from kineticlip.formats import (
    FORMATS,
    TARGETS,
    convert,
    fold_patch_bias,
    interpolate_positions,
    load_clip_state,
    load_into,
    read_checkpoint,
    round_like_clip,
    save_checkpoint,
)
from kineticlip.formats.container import Contents, read_contents
from kineticlip.formats.table import identify

Open = Callable[[str], Path]


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """`sample(name)`: the path of one of checkpoint_files.FILES, written once."""
    folder = tmp_path_factory.mktemp("checkpoints")
    written: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in written:
            written[name] = files.write(name, folder)
        return written[name]

    return path


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


# Reading ----------------------------------------------------------------------------------------


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

    theirs = files.hugging_face_clip()
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


# Nothing is executed, nothing damaged is believed -----------------------------------------------


class _Touch:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


class _Shell:
    """Unpickling this runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("exit 1",))


def test_objects_in_a_pickle_are_refused_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "run"
    for name, protocol in (("zip.pt", True), ("legacy.pt", False)):
        path = tmp_path / name
        torch.save({"state_dict": _Touch(trap)}, path, _use_new_zipfile_serialization=protocol)
        with pytest.raises(UserError, match="Python objects, which are never loaded"):
            read_checkpoint(path)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        (tmp_path / "bare.pkl").write_bytes(pickle.dumps(_Touch(trap), protocol=protocol))
        with pytest.raises(UserError, match="Python objects, which are never loaded"):
            read_checkpoint(tmp_path / "bare.pkl")
    torch.save({"x": _Shell()}, tmp_path / "shell.pt")
    with pytest.raises(UserError, match=r"Python objects, which are never loaded \(.*\.system"):
        read_checkpoint(tmp_path / "shell.pt")
    assert not trap.exists()


def test_a_hostile_torchscript_archive_is_refused_not_run(sample: Open, tmp_path: Path) -> None:
    trap = tmp_path / "run"
    for payload, message in (
        (pickle.dumps(_Touch(trap), protocol=2), "refused to load '"),
        (b"\x80\x02c__torch__\nX\n)\x81K\x05b.", "a module state that is not a dictionary"),
        (b"not a pickle", "TorchScript archive"),
    ):
        path = tmp_path / "evil.pt"
        with zipfile.ZipFile(sample("openai_jit")) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                evil = entry.filename.endswith("/data.pkl")
                new.writestr(entry, payload if evil else old.read(entry))
        with pytest.raises(UserError, match=message):
            read_checkpoint(path)
    assert not trap.exists()


def test_a_torchscript_storage_shorter_than_declared_is_refused(
    sample: Open, tmp_path: Path
) -> None:
    path = tmp_path / "short.pt"
    with zipfile.ZipFile(sample("openai_jit")) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            short = "/data/" in entry.filename and len(data) > 100
            new.writestr(entry.filename, data[:-64] if short else data)
    with pytest.raises(UserError, match="shorter than declared"):
        read_checkpoint(path)


def test_compressed_torchscript_records_are_refused(sample: Open, tmp_path: Path) -> None:
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(sample("openai_jit")) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"data\.pkl is compressed"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["openai_jit", "openai_state", "openai_safetensors", "evl"])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.4, 0.999])
def test_truncated_files_are_user_errors(
    sample: Open, tmp_path: Path, name: str, fraction: float
) -> None:
    whole = sample(name).read_bytes()
    path = tmp_path / f"cut{sample(name).suffix}"
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(UserError, match=str(path)):
        read_checkpoint(path)


def test_foreign_files_are_user_errors(tmp_path: Path) -> None:
    for name, data in (
        ("page.pt", b"<html>404</html>"),
        ("page.safetensors", b"<html>404</html>"),
        ("table.pth", b"a,b\n1,2\n"),
        ("noise.bin", bytes(range(256)) * 9),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"other\.zip"):
        read_checkpoint(tmp_path / "other.zip")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="expected a dictionary of tensors, found list"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)


# Writing ----------------------------------------------------------------------------------------

# What each target may hold: every sample that has those parts must come back to the bit.
ROUND_TRIPS = {
    "openai": ("openai_jit", "openai_resnet", "open_clip_training", "hf_clip"),
    "open_clip": ("openai_state", "open_clip_custom_text"),
    "text4vis": (
        "text4vis_vit_plain", "text4vis_vit_tsm", "text4vis_vit_tokent1d", "text4vis_vit_joint",
        "text4vis_rn_plain", "text4vis_rn_tsm", "text4vis_no_header",
    ),
    "nce": ("nce", "bike_sentence"),
    "evl": ("evl", "evl_finetuned"),
    "vitaclip": ("vitaclip", "vitaclip_backbone", "openai_state"),
    "kineticlip": tuple(FILES),
}  # fmt: skip


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, all_ in ROUND_TRIPS.items() for name in all_]
)
def test_round_trips_are_exact(sample: Open, tmp_path: Path, target: str, name: str) -> None:
    before = read_checkpoint(sample(name))
    out = tmp_path / f"out{TARGETS[target].suffixes[0]}"
    convert(sample(name), out, to=target)
    after = read_checkpoint(out)
    assert after.format == ("bike" if (target, name) == ("nce", "bike_sentence") else target)
    assert_same(after.tensors, before.tensors)
    assert after.metadata.get("temporal_module") == before.metadata.get("temporal_module")


@pytest.mark.parametrize("case", ["vit_plain", "vit_tsm", "vit_tokent1d", "rn_plain", "rn_tsm"])
def test_text4vis_files_have_the_official_names(sample: Open, tmp_path: Path, case: str) -> None:
    own = tmp_path / "own.safetensors"
    convert(sample(f"text4vis_{case}"), own, to="kineticlip")
    convert(own, tmp_path / "official.pt", to="text4vis")
    saved = torch.load(tmp_path / "official.pt", weights_only=True)
    assert saved["epoch"] == 29
    assert_same(saved["model_state_dict"], files.text4vis_state(case))


def test_vitaclip_files_have_the_official_names(sample: Open, tmp_path: Path) -> None:
    convert(sample("vitaclip"), tmp_path / "out.pth", to="vitaclip")
    saved = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert_same(saved, {f"module.{n}": t for n, t in files.vitaclip_state().items()})


def test_evl_backbone_from_clip_is_the_official_conversion_to_the_bit(
    sample: Open, tmp_path: Path
) -> None:
    convert(sample("clip_visual"), tmp_path / "out.pth", to="evl")
    saved = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    official = json.loads((GOLDEN / "evl/rect/clip_conversion.json").read_text())
    got = {
        name.removeprefix("module.backbone."): hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in saved.items()
    }
    assert got == {name: entry["sha256_f32_le"] for name, entry in official.items()}


def test_open_clip_loads_what_is_written_for_it(tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)

    def build() -> nn.Module:
        return open_clip.model.CLIP(
            embed_dim=16,
            vision_cfg={"layers": 1, "width": 64, "patch_size": 16, "image_size": 32},
            text_cfg={"context_length": 8, "vocab_size": 32, "width": 64, "heads": 1, "layers": 1},
        )

    source, target = build(), build()
    torch.save(source.state_dict(), tmp_path / "source.pt")
    convert(tmp_path / "source.pt", tmp_path / "out.pt", to="open_clip")
    open_clip.load_checkpoint(target, str(tmp_path / "out.pt"))
    assert_same(target.state_dict(), source.state_dict())


def test_a_conversion_says_what_it_left_behind(sample: Open, tmp_path: Path) -> None:
    result = convert(sample("nce"), tmp_path / "out.pt", to="openai", dry_run=True)
    assert not (tmp_path / "out.pt").exists()
    header = {f"fusion_model.{name}" for name in files.header_state()}
    assert set(result.dropped) == header
    assert set(result.dropped.values()) == {"no part of openai"}
    assert result.num_source == result.num_written + len(header)


def test_targets_refuse_sources_without_what_they_need(sample: Open, tmp_path: Path) -> None:
    for name, target, lacks in (
        ("text4vis_vit_plain", "openai", "token_embedding.weight"),
        ("evl", "text4vis", "visual.conv1.weight"),
        ("evl_finetuned", "vitaclip", "visual.proj"),
    ):
        with pytest.raises(UserError, match=f"cannot become {target}: it holds no .*{lacks}"):
            convert(sample(name), tmp_path / "out.pt", to=target)
    with pytest.raises(UserError, match=r"holds no decoder\.cls_token or visual\.class_embedding"):
        convert(sample("openai_resnet"), tmp_path / "out.pt", to="evl")
    with pytest.raises(UserError, match="Did you mean 'vitaclip'"):
        convert(sample("evl"), tmp_path / "out.pt", to="vita-clip")
    with pytest.raises(UserError, match=r"kineticlip is written as \.safetensors"):
        convert(sample("evl"), tmp_path / "out.pt", to="kineticlip")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(
    sample: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.pt"
    out.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        convert(sample("openai_state"), out, to="openai")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


# Loading into modules ---------------------------------------------------------------------------


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


# The command ------------------------------------------------------------------------------------


def test_convert_command(sample: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kineticlip.cli import main

    out = tmp_path / "new" / "evl.pth"
    assert main(["convert", str(sample("vitaclip")), str(out), "--to", "evl"]) == 0
    printed = capsys.readouterr().out
    assert "visual.blocks.*.norm1.* -> visual.transformer.resblocks.*.ln_1.*  (6)\n" in printed
    assert "dropped prompt_learner.ctx: no part of evl" in printed
    assert read_checkpoint(out).format == "evl"

    arguments = ["convert", str(sample("nce")), str(tmp_path / "x.pt"), "--to", "text4vis"]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["written"] is False
    assert document["source_format"] == "nce"
    assert document["dropped"]["ln_final.bias"] == "no part of text4vis"
    assert not (tmp_path / "x.pt").exists()

    assert main(["convert", str(tmp_path / "x.pt"), "y.pt", "--to", "openai"]) == 2
    assert "no such checkpoint" in capsys.readouterr().err


def test_source_names_of_goldens_are_those_of_the_official_files() -> None:
    """The samples above stand on official key lists; a drift of these would hide everything."""
    keys = json.loads((GOLDEN / "text4vis/checkpoint_keys.json").read_text())
    fusion = load_file(GOLDEN / "text4vis/fusion_transf.safetensors")
    assert {name for name, _ in keys["fusion_model (sim_header Transf adds)"]} == fusion.keys()
    vit = {name for name in files.clip_vit() if name.startswith("visual.")}
    assert {name for name, _ in keys["vit_plain"]} == {*vit, "logit_scale"}
