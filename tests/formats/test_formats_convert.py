"""Checkpoints written for other code bases, and the command that does it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint_files as files
from checkpoint_files import FILES, GOLDEN, assert_same
from kineticlip.formats import TARGETS, convert, read_checkpoint
from kineticlip.runtime.errors import UserError

Open = Callable[[str], Path]


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
    with pytest.raises(UserError, match=r"out\.pt: cannot be written: no space"):
        convert(sample("openai_state"), out, to="openai")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_convert_command(sample: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kineticlip.__main__ import main

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
