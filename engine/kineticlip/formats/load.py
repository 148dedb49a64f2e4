"""From a file to a module: one reader, one loader, and the two transforms a caller may ask for."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kineticlip.formats.files import Tensors, read_contents
from kineticlip.formats.names import AFFINE, PATCH_BIAS, TEXT, VISUAL, fold_patch_bias
from kineticlip.formats.table import CLIP_FORMATS, apply_rules, identify
from kineticlip.runtime.errors import UserError

log = logging.getLogger(__name__)

_CLIP = re.compile(rf"visual\.(?:{VISUAL}|conv1\.bias)|{TEXT}|logit_scale")
# Convolutions, Linear layers, attention projections and the two output matrices: what clip.load
# holds in half precision. Norms, embeddings and the logit scale stay single.
_ROUNDED = re.compile(
    r"(?:visual\.)?(?:"
    r"proj|text_projection|conv[123]\.weight"
    r"|layer[1-4]\.\d+\.(?:conv[123]|downsample\.0)\.weight"
    rf"|attnpool\.[qkvc]_proj\.{AFFINE}"
    rf"|transformer\.resblocks\.\d+\.(?:attn\.in_proj_{AFFINE}|(?:attn\.out_proj"
    rf"|mlp\.c_fc|mlp\.c_proj)\.{AFFINE}))"
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint under our names, in the file's dtypes.

    metadata: plain values beside the tensors (epoch, next_step, temporal_module, ...).
    renamed, dropped: source names as read, for reports.
    """

    format: str
    tensors: Tensors
    metadata: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    @property
    def is_clip(self) -> bool:
        """Whether this is CLIP as it was published, or converted from that: not fine-tuned."""
        return self.metadata.get("source_format", self.format) in CLIP_FORMATS


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What `load_into` left alone: parameters without a tensor, tensors without a parameter."""

    kept: tuple[str, ...]
    ignored: tuple[str, ...]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads any known layout; every name in the file is renamed or dropped on purpose.

    Raises UserError for a file that is missing, damaged, of no known or of several formats, or
    that holds names its format does not know.
    """
    contents = read_contents(path)
    layout = identify(contents, str(path))
    rules = apply_rules(contents.tensors, layout.rename, str(path), f"format {layout.name}")
    renamed = {name: new for name, new in rules.items() if new is not None}
    try:
        tensors = layout.finish({new: contents.tensors[name] for name, new in renamed.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Checkpoint(
        format=layout.name,
        tensors=tensors,
        metadata={**contents.values, **layout.note(contents.tensors.keys())},
        renamed=renamed,
        dropped=tuple(name for name, new in rules.items() if new is None),
    )


def load_clip_state(path: str | Path, *, round_fp16: bool = False) -> Tensors:
    """The CLIP part of any known checkpoint: OpenAI names, float32.

    round_fp16 rounds what the official `clip.load` rounds (see `round_like_clip`). Parts that a
    method adds are left out; the text tower is there only if the file has one.
    """
    checkpoint = read_checkpoint(path)
    state = clip_part(checkpoint.tensors)
    if not any(name.startswith("visual.") for name in state):
        raise UserError(
            f"{path}: a checkpoint of format {checkpoint.format} without CLIP's visual tower"
        )
    state = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    return round_like_clip(state) if round_fp16 else state


def clip_part(tensors: Mapping[str, Tensor]) -> Tensors:
    """Only the two CLIP towers and the logit scale; a patch bias is folded away."""
    return fold_patch_bias({n: t for n, t in tensors.items() if _CLIP.fullmatch(n)})


def round_like_clip(tensors: Mapping[str, Tensor]) -> Tensors:
    """Rounds through float16 what `clip.load` keeps in half precision, dtypes unchanged.

    OpenAI's own files hold float16 there already; only fine-tuned float32 weights change.
    """
    return {
        name: tensor.half().to(tensor.dtype) if _ROUNDED.fullmatch(name) else tensor
        for name, tensor in tensors.items()
    }


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    what: str,
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
) -> Loaded:
    """Copies tensors into a module by name; all or nothing.

    what: the source, for messages. optional: patterns of whole parameter names that may be
    missing from the tensors and then keep their values; ignored: patterns of tensor names that
    the module need not have. A patch-convolution bias, which EVL and Vita-CLIP files carry, goes
    into the position embedding where the module has no place for it.
    Raises UserError with every missing, unexpected and misshapen name in one message.
    """
    own = module.state_dict()
    if any(name in tensors and name not in own for name in (PATCH_BIAS, "conv1.bias")):
        tensors = fold_patch_bias(dict(tensors))
        log.info("%s: the patch bias is folded into the position embedding", what)
    kept = tuple(name for name in own if name not in tensors)
    extra = tuple(name for name in tensors if name not in own)
    problems = [f"missing '{name}'" for name in kept if not _any_match(name, optional)]
    problems += [f"unexpected '{name}'" for name in extra if not _any_match(name, ignored)]
    for name, tensor in tensors.items():
        if name in own and own[name].shape != tensor.shape:
            problems.append(
                f"'{name}' is {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}"
            )
    if problems:
        shown = "; ".join(problems[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(
            f"{what} does not fit {type(module).__name__}: {shown}{more}{_hint(problems)}"
        )
    module.load_state_dict({n: t for n, t in tensors.items() if n in own}, strict=False)
    return Loaded(kept=kept, ignored=extra)


def _any_match(name: str, patterns: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _hint(problems: list[str]) -> str:
    if any(re.match(r"'(?:visual\.)?(?:attnpool\.)?positional_embedding' is", p) for p in problems):
        return ". For another resolution, see kineticlip convert --resolution"
    return ""


def interpolate_positions(tensors: Mapping[str, Tensor], resolution: int) -> Tensors:
    """Resizes the visual position embedding to another input resolution, and logs it.

    Bicubic with antialiasing over the patch grid, in float32; the class token's row is kept.
    The official codes never do this. Raises UserError where other parameters fix the resolution
    too (EVL's displacement tables) or where the resolution is no whole number of patches.
    """
    if any(re.match(r"decoder\.cross_attention\.", name) for name in tensors):
        raise UserError(
            "EVL's temporal cross-attention is tied to its resolution; it cannot be changed"
        )
    name = next(
        (n for n in tensors if re.fullmatch(r"visual\.(attnpool\.)?positional_embedding", n)), None
    )
    if name is None:
        raise UserError("no visual position embedding to interpolate")
    positions = tensors[name]  # [1 + grid * grid, D]
    patch = 32 if "attnpool" in name else tensors["visual.conv1.weight"].shape[-1]
    old = round((len(positions) - 1) ** 0.5)
    if old * old != len(positions) - 1:
        raise UserError(f"'{name}' {tuple(positions.shape)} is not over a square grid")
    new, rest = divmod(resolution, patch)
    if rest or new < 1:
        raise UserError(f"resolution {resolution} is no multiple of the patch size {patch}")
    if new == old:
        return dict(tensors)
    grid = positions[1:].float().T.unflatten(1, (old, old))[None]  # [1, D, old, old]
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False, antialias=True)
    resized = torch.cat([positions[:1], grid[0].flatten(1).T.to(positions.dtype)])
    log.warning("'%s' interpolated from a %dx%d to a %dx%d grid", name, old, old, new, new)
    return {**tensors, name: resized}  # [1 + new * new, D]
