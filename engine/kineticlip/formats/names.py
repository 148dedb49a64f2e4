"""The grammar of CLIP parameter names, and the transforms that a plain rename cannot express.

In memory every checkpoint has the same names: OpenAI's for both CLIP towers (`visual.*`; the text
tower at the root), the official ones for what a method adds (`fusion_model.*`, `decoder.*`, ...).
"""

from __future__ import annotations

import re

import torch

from kineticlip.formats.files import Tensors

# Each is an alternation without capturing groups, to be placed inside a larger pattern.
AFFINE = r"(?:weight|bias)"
BATCH_NORM = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
BLOCK = (
    rf"(?:ln_[12]\.{AFFINE}|attn\.in_proj_{AFFINE}|attn\.out_proj\.{AFFINE}"
    rf"|mlp\.c_(?:fc|proj)\.{AFFINE})"
)
BLOCKS = rf"(?:transformer\.resblocks\.\d+\.{BLOCK})"
VIT = (
    r"(?:class_embedding|positional_embedding|proj|conv1\.weight"
    rf"|ln_(?:pre|post)\.{AFFINE}|{BLOCKS})"
)
RESNET = (
    rf"(?:conv[123]\.weight|bn[123]\.{BATCH_NORM}"
    rf"|layer[1-4]\.\d+\.(?:conv[123]\.weight|bn[123]\.{BATCH_NORM})"
    rf"|layer[1-4]\.\d+\.downsample\.(?:0\.weight|1\.{BATCH_NORM})"
    rf"|attnpool\.(?:positional_embedding|[qkvc]_proj\.{AFFINE}))"
)
VISUAL = rf"(?:{VIT}|{RESNET})"
TEXT = (
    rf"(?:token_embedding\.weight|positional_embedding|text_projection|ln_final\.{AFFINE}|{BLOCKS})"
)
# What Text4Vis adds inside the tower: tokent1d's convolution, joint attention's time embedding.
TEXT4VIS_VISUAL = r"(?:time_embedding|transformer\.resblocks\.\d+\.control_point\.conv\.weight)"
# What Vita-CLIP's prompts add to a block; X-CLIP's message token is its summary token.
SUMMARY = rf"(?:(?:cls_proj|summary_ln)\.{AFFINE}|summary_attn_layer\.(?:[qkv]|out)_proj\.{AFFINE})"
# Attentions whose projections are still apart (EVL, Vita-CLIP, Hugging Face).
_ATTENTION = r"(.*transformer\.resblocks\.\d+\.attn|prompts\.blocks\.\d+\.summary_attn_layer)"
_SPLIT = re.compile(rf"{_ATTENTION}\.([qkv])_proj\.(weight|bias)")
_FUSED = re.compile(rf"{_ATTENTION}\.in_proj_(weight|bias)")
PATCH_BIAS = "visual.conv1.bias"


def fuse_projections(tensors: Tensors) -> Tensors:
    """`attn.{q,k,v}_proj` of every block -> `attn.in_proj`; a missing third stays visible."""
    fused: Tensors = {}
    for name, tensor in tensors.items():
        match = _SPLIT.fullmatch(name)
        thirds = [f"{match[1]}.{part}_proj.{match[3]}" for part in "qkv"] if match else []
        if not match or not all(third in tensors for third in thirds):
            fused[name] = tensor
        elif match[2] == "q":
            fused[f"{match[1]}.in_proj_{match[3]}"] = torch.cat([tensors[t] for t in thirds])
    return fused


def split_projections(tensors: Tensors, tower: str = "") -> Tensors:
    """The inverse of `fuse_projections` for the blocks whose names start with `tower`."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match and name.startswith(tower):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                split[f"{match[1]}.{part}_proj.{match[2]}"] = third.clone()
        else:
            split[name] = tensor
    return split


def drop_zero_patch_bias(tensors: Tensors) -> Tensors:
    """CLIP's patch convolution has no bias; a zero one, as EVL writes it, says the same."""
    bias = tensors.get(PATCH_BIAS)
    if bias is None or bool(bias.any()):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != PATCH_BIAS}


def add_patch_bias(tensors: Tensors) -> Tensors:
    """The inverse of `drop_zero_patch_bias`, for formats that always carry the bias."""
    weight = tensors.get("visual.conv1.weight")
    if weight is None or PATCH_BIAS in tensors or "visual.class_embedding" not in tensors:
        return tensors
    return {**tensors, PATCH_BIAS: torch.zeros(weight.shape[0], dtype=weight.dtype)}


def fold_patch_bias(tensors: Tensors) -> Tensors:
    """Moves a patch bias into the position embedding of the patch tokens: the same function.

    Both are added to every patch token before anything else happens to it; the class token gets
    neither. One rounding apart from adding them in turn. [D] into rows 1.. of [N, D]. Names may
    start with `visual.` or be those of the tower alone.
    """
    prefix = next((p for p in ("visual.", "") if f"{p}conv1.bias" in tensors), None)
    if prefix is None:
        return tensors
    folded = dict(tensors)
    bias = folded.pop(f"{prefix}conv1.bias")
    positions = folded[f"{prefix}positional_embedding"].clone()  # [N, D]
    positions[1:] += bias.to(positions.dtype)
    folded[f"{prefix}positional_embedding"] = positions
    return folded
