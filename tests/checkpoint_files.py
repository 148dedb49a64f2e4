"""One small checkpoint file of every layout, under the official names and with random values."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
# Sizes of the ViT-B/16 key list, made small; one size becomes one size, so shapes stay coherent.
_SMALL = {768: 24, 3072: 96, 512: 16, 1536: 48, 2048: 64, 49408: 40, 400: 5, 197: 10}


def random_like(shapes: dict[str, list[int]], *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def clip_vit() -> dict[str, Tensor]:
    """A whole CLIP with a ViT, fp16, OpenAI's names."""
    return load_file(GOLDEN / "text4vis" / "clip_vit_base.safetensors")


def clip_resnet() -> dict[str, Tensor]:
    """The same with a modified ResNet; the text side is the ViT model's."""
    text = {name: t for name, t in clip_vit().items() if not name.startswith("visual.")}
    keys = json.loads((GOLDEN / "text4vis" / "checkpoint_keys.json").read_text())
    visual = {
        name: tensor.long() if name.endswith("num_batches_tracked") else tensor.half()
        for name, tensor in random_like(dict(keys["rn_plain"]), seed=3).items()
    }
    return {**text, **visual}


def text4vis_state(case: str, *, header: bool = True) -> dict[str, Tensor]:
    """The model_state_dict of official VideoCLIP for one of the golden cases."""
    keys = json.loads((GOLDEN / "text4vis" / "checkpoint_keys.json").read_text())
    names = keys[case] + (keys["fusion_model (sim_header Transf adds)"] if header else [])
    return random_like(dict(names), seed=1)


def header_state() -> dict[str, Tensor]:
    fusion = load_file(GOLDEN / "text4vis" / "fusion_transf.safetensors")
    return {name.removeprefix("fusion_model."): tensor for name, tensor in fusion.items()}


def sentence_state() -> dict[str, Tensor]:
    layers = [f"{part}_fc.{index}" for part in ("sentence", "query") for index in (0, 2)]
    shapes: dict[str, list[int]] = {f"{layer}.weight": [64, 64] for layer in layers}
    return random_like({**shapes, **{f"{layer}.bias": [64] for layer in layers}}, seed=2)


def vitaclip_state() -> dict[str, Tensor]:
    """The 512 official names of ViT-B/16, three of whose twelve blocks are kept."""
    entries = json.loads((GOLDEN / "vitaclip" / "vitb16_keys.json").read_text())
    shapes = {e["key"]: [_SMALL.get(size, size) for size in e["shape"]] for e in entries}
    deep = tuple(f"{kind}.{n}." for kind in ("blocks", "resblocks") for n in range(3, 12))
    return random_like({k: s for k, s in shapes.items() if not any(d in k for d in deep)}, seed=3)


def evl_checkpoint() -> dict[str, Any]:
    """What the official code saved: model and optimiser, keys as in the golden file."""
    tree: dict[str, Any] = {"loss_scaler": {}, "next_step": 2, "lr_sched": {"T_max": 4}}
    for name, tensor in load_file(GOLDEN / "evl" / "checkpoint_mini.safetensors").items():
        section, rest = name.split(".", 1)
        if section == "optimizer":
            _, index, field = rest.split(".")
            state = tree.setdefault("optimizer", {"state": {}, "param_groups": [{"lr": 0.1}]})
            state["state"].setdefault(int(index), {})[field] = tensor
        else:
            tree.setdefault(section, {})[rest] = tensor
    return tree


def evl_finetuned() -> dict[str, Any]:
    """A fine-tuned one: the backbone is saved too, its patch bias no longer zero."""
    vita = vitaclip_state()
    inside = tuple(f"visual.{part}" for part in ("cls_token", "pos_embed", "patch_embed", "ln_pre"))
    tower = {name: tensor for name, tensor in vita.items() if name.startswith(inside)}
    tower |= {
        name: tensor
        for name, tensor in vita.items()
        if name.startswith("visual.blocks.")
        and not any(part in name for part in ("local", "summary", "cls_proj"))
    }
    tower["visual.patch_embed.proj.weight"] = tower["visual.patch_embed.proj.weight"].flatten(1)
    tree = evl_checkpoint()
    backbone = {name.replace("visual.", "module.backbone.", 1): t for name, t in tower.items()}
    return {"model": {**tree["model"], **backbone}}


def hugging_face_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**_hugging_face_sizes())).eval()


def hugging_face_xclip() -> nn.Module:
    from transformers import XCLIPConfig, XCLIPModel

    sizes = _hugging_face_sizes()
    sizes["vision_config"] |= {
        "mit_hidden_size": 24, "mit_intermediate_size": 48, "mit_num_hidden_layers": 1,
        "mit_num_attention_heads": 2, "num_frames": 4,
    }  # fmt: skip
    return XCLIPModel(XCLIPConfig(**sizes, prompt_layers=1, prompt_num_attention_heads=2)).eval()


def _hugging_face_sizes() -> dict[str, Any]:
    common = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "projection_dim": 24,
        "text_config": {"hidden_size": 16, "intermediate_size": 64, "vocab_size": 64, **common},
        "vision_config": {"hidden_size": 32, "intermediate_size": 128, "image_size": 32,
                          "patch_size": 16, **common},
    }  # fmt: skip


class _Attributes(nn.Module):
    """A module tree with the given tensors, to be saved as TorchScript."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        below: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            head, dot, rest = name.partition(".")
            if dot:
                below.setdefault(head, {})[rest] = tensor
            else:
                self.register_buffer(head, tensor)
        for name, part in below.items():
            self.add_module(name, _Attributes(part))

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def save_torchscript(state: dict[str, Tensor], path: Path) -> None:
    """As OpenAI publishes CLIP: a traced module, three counts and a mask among its tensors."""
    others = {n: torch.tensor(224) for n in ("input_resolution", "context_length", "vocab_size")}
    others["transformer.resblocks.0.attn_mask"] = torch.zeros(77, 77)
    module = _Attributes({**state, **others})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit's own, on torch.jit
        torch.jit.save(torch.jit.trace(module, torch.zeros(1)), path)


def _save_torch(make: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda path: torch.save(make(), path)


def _text4vis_checkpoint(case: str) -> dict[str, Any]:
    return {
        "epoch": 29,
        "model_state_dict": {f"module.{n}": t for n, t in text4vis_state(case).items()},
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}},
    }


# name -> (format it must be read as, suffix, writer)
FILES: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "openai_jit": ("openai", ".pt", lambda path: save_torchscript(clip_vit(), path)),
    "openai_state": ("openai", ".pt", _save_torch(clip_vit)),
    "openai_resnet": ("openai", ".pt", _save_torch(clip_resnet)),
    "openai_safetensors": ("openai", ".safetensors", lambda path: save_file(clip_vit(), path)),
    "clip_visual": (
        "clip_visual",
        ".safetensors",
        lambda path: save_file(load_file(GOLDEN / "evl/rect/clip_visual.safetensors"), path),
    ),
    "open_clip_training": (
        "open_clip",
        ".pt",
        _save_torch(
            lambda: {
                "epoch": 3,
                "name": "run",
                "state_dict": {f"module.{n}": t for n, t in clip_vit().items()},
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
            }
        ),
    ),
    "open_clip_custom_text": (
        "open_clip",
        ".bin",
        _save_torch(
            lambda: {
                n if n.startswith(("visual.", "logit_scale")) else f"text.{n}": t
                for n, t in clip_vit().items()
            }
        ),
    ),
    **{
        f"text4vis_{case}": (
            "text4vis",
            ".pt",
            _save_torch(partial(_text4vis_checkpoint, case)),
        )
        for case in ("vit_plain", "vit_tokent1d", "vit_tsm", "vit_joint", "rn_plain", "rn_tsm")
    },
    "text4vis_no_header": (
        "text4vis",
        ".pt",
        _save_torch(lambda: text4vis_state("vit_plain", header=False)),
    ),
    "nce": (
        "nce",
        ".pt",
        _save_torch(
            lambda: {
                "epoch": 4,
                "model_state_dict": {f"module.{n}": t for n, t in clip_vit().items()},
                "fusion_model_state_dict": {f"module.{n}": t for n, t in header_state().items()},
            }
        ),
    ),
    "bike_sentence": (
        "bike",
        ".pt",
        _save_torch(
            lambda: {
                "epoch": 4,
                "model_state_dict": clip_vit(),
                "fusion_model_state_dict": sentence_state(),
            }
        ),
    ),
    "evl": ("evl", ".pth", _save_torch(evl_checkpoint)),
    "evl_finetuned": ("evl", ".pth", _save_torch(evl_finetuned)),
    "vitaclip": (
        "vitaclip",
        ".pth",
        _save_torch(
            lambda: {
                "model": {f"module.{n}": t for n, t in vitaclip_state().items()},
                "optimizer": {"state": {}, "param_groups": []},
                "next_step": 9,
            }
        ),
    ),
    "vitaclip_backbone": (
        "vitaclip",
        ".pth",
        _save_torch(
            lambda: {
                n: t
                for n, t in vitaclip_state().items()
                if not any(p in n for p in ("local_", "summary", "cls_proj", "global_", "time_"))
                and not n.startswith("prompt_learner")
            }
        ),
    ),
    "hf_clip": ("hf_clip", ".bin", _save_torch(lambda: hugging_face_clip().state_dict())),
    "hf_xclip": (
        "hf_xclip",
        ".safetensors",
        lambda path: save_file(hugging_face_xclip().state_dict(), path, metadata={"format": "pt"}),
    ),
}


def write(name: str, folder: Path) -> Path:
    _, suffix, save = FILES[name]
    path = folder / f"{name}{suffix}"
    save(path)
    return path


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
