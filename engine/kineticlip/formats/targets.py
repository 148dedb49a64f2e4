"""Layouts that can be written: which of our names each takes, and the shape of its file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kineticlip.formats.files import Tensors
from kineticlip.formats.names import (
    AFFINE,
    BLOCK,
    BLOCKS,
    TEXT,
    TEXT4VIS_VISUAL,
    VISUAL,
    add_patch_bias,
    fold_patch_bias,
    split_projections,
)  # fmt: skip
from kineticlip.formats.table import OWN_FORMAT, Rule
from kineticlip.runtime.errors import UserError

Metadata = Mapping[str, Any]
TORCH_SUFFIXES = (".pt", ".pth", ".bin")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One layout to write.

    prepare: undoes what the reader's finish did. rename: our name -> its name, None: not part of
    this layout. needs: patterns of our names without which the file would be useless.
    wrap: renamed tensors and metadata -> what torch.save gets.
    """

    name: str
    suffixes: tuple[str, ...] = TORCH_SUFFIXES
    prepare: Callable[[Tensors, Metadata], Tensors] = lambda tensors, metadata: tensors
    rename: tuple[Rule, ...]
    needs: tuple[str, ...]
    wrap: Callable[[Tensors, Metadata], dict[str, Any]] = lambda tensors, metadata: dict(tensors)


# What methods add to CLIP; a layout of another method leaves these out, and the report says so.
_FUSION = rf"fusion_model\.(?:{BLOCKS}|frame_position_embeddings\.weight)"
_SENTENCE = rf"fusion_model\.(?:sentence|query)_fc\.[02]\.{AFFINE}"
_EVL = r"decoder\..+|proj\.[02]\..+"
_VITA = r"prompts\..+|prompt_learner\..+"  # X-CLIP's message tokens are `prompts` too
_XCLIP = r"mit\..+|prompts_.+"
_TEXT_SIDE = TEXT
_CLIP_NAMES: tuple[Rule, ...] = ((rf"(visual\.{VISUAL}|{TEXT}|logit_scale)", r"\1"),)
_NO_METHOD: tuple[Rule, ...] = (
    (rf"fusion_model\..+|{_EVL}|{_VITA}|{_XCLIP}|visual\.{TEXT4VIS_VISUAL}", None),
)
_WHOLE_CLIP = (
    r"visual\.conv1\.weight",
    r"visual\.(?:proj|attnpool\.c_proj\.weight)",
    r"token_embedding\.weight",
    r"text_projection",
    r"logit_scale",
)


def _plain_tower(tensors: Tensors, metadata: Metadata) -> Tensors:
    return fold_patch_bias(tensors)


def _shifted_tower(tensors: Tensors, metadata: Metadata) -> Tensors:
    """Puts back the `net` that TSM writes into names.

    In a ResNet with 23 or more blocks in its third stage only every second block is shifted.
    """
    tensors = fold_patch_bias(tensors)
    if metadata.get("temporal_module") != "tsm":
        return tensors
    deep = any(re.match(r"visual\.layer3\.22\.", name) for name in tensors)
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        new = re.sub(rf"^(visual\.transformer\.resblocks\.\d+)\.({BLOCK})$", r"\1.net.\2", name)
        conv = re.fullmatch(r"(visual\.layer[1-4]\.(\d+)\.conv1)\.weight", name)
        if conv and (not deep or int(conv[2]) % 2 == 0):
            new = f"{conv[1]}.net.weight"
        renamed[new] = tensor
    return renamed


def _evl_tower(tensors: Tensors, metadata: Metadata) -> Tensors:
    tensors = add_patch_bias(split_projections(tensors, tower="visual."))
    weight = tensors.get("visual.conv1.weight")
    return tensors if weight is None else {**tensors, "visual.conv1.weight": weight.flatten(1)}


def _vita_tower(tensors: Tensors, metadata: Metadata) -> Tensors:
    split = split_projections(split_projections(tensors, tower="visual."), tower="prompts.")
    tensors = add_patch_bias(split)
    tokens, context = (tensors.get(f"prompt_learner.{name}") for name in ("tokens", "ctx"))
    embedding = tensors.get("token_embedding.weight")
    if tokens is None or context is None or embedding is None:
        return tensors
    # We keep token numbers, the official code their embeddings, the context's left out.
    embedded = embedding[tokens]  # [C, 77, W]
    tensors["prompt_learner.token_prefix"] = embedded[:, :1].clone()
    tensors["prompt_learner.token_suffix"] = embedded[:, 1 + context.shape[-2] :].clone()
    return tensors


def _official_tower(root: str) -> tuple[Rule, ...]:
    """Our visual names -> those of the tower that EVL and Vita-CLIP share."""
    blocks = r"visual\.transformer\.resblocks\.(\d+)\."
    return (
        (r"visual\.class_embedding", f"{root}cls_token"),
        (r"visual\.positional_embedding", f"{root}pos_embed"),
        (rf"visual\.conv1\.({AFFINE})", rf"{root}patch_embed.proj.\1"),
        (rf"visual\.(ln_pre\.{AFFINE})", rf"{root}\1"),
        (rf"{blocks}(attn\.(?:[qkv]|out)_proj\.{AFFINE})", rf"{root}blocks.\1.\2"),
        (rf"{blocks}ln_([12])\.({AFFINE})", rf"{root}blocks.\1.norm\2.\3"),
        (rf"{blocks}mlp\.c_fc\.({AFFINE})", rf"{root}blocks.\1.mlp.fc1.\2"),
        (rf"{blocks}mlp\.c_proj\.({AFFINE})", rf"{root}blocks.\1.mlp.fc2.\2"),
    )


def _epoch(metadata: Metadata) -> dict[str, int]:
    try:
        return {"epoch": int(metadata.get("epoch", 0))}
    except (TypeError, ValueError):
        return {"epoch": 0}


def _wrap_nce(tensors: Tensors, metadata: Metadata) -> dict[str, Any]:
    header = {n: t for n, t in tensors.items() if n.startswith("fusion_model.")}
    return {
        **_epoch(metadata),
        "model_state_dict": {n: t for n, t in tensors.items() if n not in header},
        "fusion_model_state_dict": {n.removeprefix("fusion_model."): t for n, t in header.items()},
    }


def _wrap_distributed(tensors: Tensors, metadata: Metadata) -> dict[str, Any]:
    """EVL and Vita-CLIP save, and expect, the names of a DistributedDataParallel module."""
    return {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}}


_NET = r"(?:net\.)?"
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name=OWN_FORMAT,
            suffixes=(".safetensors",),
            rename=((r"(.+)", r"\1"),),
            needs=(),
        ),
        Target(
            name="openai",
            prepare=_plain_tower,
            rename=(*_CLIP_NAMES, *_NO_METHOD),
            needs=_WHOLE_CLIP,
        ),
        Target(
            name="open_clip",
            prepare=_plain_tower,
            rename=(*_CLIP_NAMES, *_NO_METHOD),
            needs=_WHOLE_CLIP,
            wrap=lambda tensors, metadata: {**_epoch(metadata), "state_dict": dict(tensors)},
        ),
        Target(
            name="text4vis",
            prepare=_shifted_tower,
            rename=(
                (
                    rf"(visual\.(?:transformer\.resblocks\.\d+\.{_NET}{BLOCK}"
                    rf"|layer[1-4]\.\d+\.conv1\.{_NET}weight|{VISUAL}|{TEXT4VIS_VISUAL})"
                    rf"|{_FUSION}|logit_scale)",
                    r"\1",
                ),
                (rf"{_TEXT_SIDE}|{_SENTENCE}", None),
                (rf"{_EVL}|{_VITA}|{_XCLIP}", None),
            ),
            needs=(*_WHOLE_CLIP[:2], r"logit_scale"),
            wrap=lambda tensors, metadata: {**_epoch(metadata), "model_state_dict": dict(tensors)},
        ),
        Target(
            name="nce",
            prepare=_shifted_tower,
            rename=(
                (
                    rf"(visual\.(?:transformer\.resblocks\.\d+\.{_NET}{BLOCK}"
                    rf"|layer[1-4]\.\d+\.conv1\.{_NET}weight|{VISUAL}|{TEXT4VIS_VISUAL})"
                    rf"|{TEXT}|{_FUSION}|{_SENTENCE}|logit_scale)",
                    r"\1",
                ),
                (rf"{_EVL}|{_VITA}|{_XCLIP}", None),
            ),
            needs=_WHOLE_CLIP,
            wrap=_wrap_nce,
        ),
        Target(
            name="evl",
            prepare=_evl_tower,
            rename=(
                *_official_tower("backbone."),
                (rf"visual\.(?:ln_post\.{AFFINE}|proj)", None),  # EVL stops before them
                (r"(decoder\..+|proj\.[02]\..+)", r"\1"),
                (rf"{_TEXT_SIDE}|logit_scale|fusion_model\..+|{_VITA}|{_XCLIP}", None),
                (rf"visual\.{TEXT4VIS_VISUAL}", None),
            ),
            needs=(r"decoder\.cls_token|visual\.class_embedding",),
            wrap=_wrap_distributed,
        ),
        Target(
            name="vitaclip",
            prepare=_vita_tower,
            rename=(
                *_official_tower("visual."),
                (rf"visual\.(ln_post\.{AFFINE}|proj)", r"visual.\1"),
                (r"prompts\.(.+)", r"visual.\1"),
                (r"prompt_learner\.tokens", None),
                (r"(prompt_learner\..+)", r"\1"),
                (rf"({TEXT})", r"textual.\1"),
                (r"(logit_scale)", r"\1"),
                (rf"fusion_model\..+|{_EVL}|{_XCLIP}|visual\.{TEXT4VIS_VISUAL}", None),
            ),
            needs=(r"visual\.class_embedding", r"visual\.proj", r"logit_scale"),
            wrap=_wrap_distributed,
        ),
    )
}


def check_needs(target: Target, tensors: Tensors, source: str) -> None:
    """UserError when the source lacks what the layout cannot do without."""
    absent = [
        pattern.replace("\\", "").replace("(?:", "(").replace("|", " or ")
        for pattern in target.needs
        if not any(re.fullmatch(pattern, name) for name in tensors)
    ]
    if absent:
        raise UserError(f"{source}: cannot become {target.name}: it holds no {', '.join(absent)}")
