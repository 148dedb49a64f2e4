"""Known checkpoint layouts: how each is told apart and what every name in it becomes.

A name that no rule mentions is an error, not a warning: a checkpoint is read whole or not at all.
Adding a layout means adding one record to FORMATS and a synthetic file to the tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kineticlip.formats import names
from kineticlip.formats.files import Contents, Tensors
from kineticlip.formats.names import AFFINE, BLOCK, BLOCKS, SUMMARY, TEXT, TEXT4VIS_VISUAL, VISUAL
from kineticlip.runtime.errors import UserError

OWN_FORMAT = "kineticlip"
Rule = tuple[str, "str | None"]  # regular expression of a whole name -> new name; None: dropped


@dataclass(frozen=True, kw_only=True)
class Format:
    """One checkpoint layout, names without `module.`.

    detect: whether names and plain values are this layout; exactly one format may say yes.
    rename: the first rule whose pattern matches a whole name decides.
    finish: what renaming cannot do, such as joining q, k and v.
    note: facts that the names carry and the renaming loses; kept as metadata.
    """

    name: str
    summary: str
    detect: Callable[[Collection[str], Mapping[str, Any]], bool]
    rename: tuple[Rule, ...]
    finish: Callable[[Tensors], Tensors] = lambda tensors: tensors
    note: Callable[[Collection[str]], dict[str, str]] = lambda names: {}


def having(
    *has: str, lacks: tuple[str, ...] = ()
) -> Callable[[Collection[str], Mapping[str, Any]], bool]:
    """Detects by names: every `has` pattern matches the start of one, no `lacks` pattern does."""
    wanted = [re.compile(pattern) for pattern in has]
    unwanted = [re.compile(pattern) for pattern in lacks]

    def detect(present: Collection[str], values: Mapping[str, Any]) -> bool:
        return (
            values.get("format") != OWN_FORMAT
            and all(any(pattern.match(name) for name in present) for pattern in wanted)
            and not any(pattern.match(name) for name in present for pattern in unwanted)
        )

    return detect


# Shared parts -----------------------------------------------------------------------------------

OPENAI: tuple[Rule, ...] = (
    (rf"(visual\.{VISUAL})", r"\1"),
    (rf"({TEXT}|logit_scale)", r"\1"),
    (r"input_resolution|context_length|vocab_size", None),  # counts that OpenAI stores as tensors
    (r"(?:.+\.)?attn_mask", None),  # the causal mask, a constant
)
# TSM wraps a ViT block, or a bottleneck's first convolution, in a module called `net`.
TEXT4VIS_TOWER: tuple[Rule, ...] = (
    (rf"model_state_dict\.(visual\.transformer\.resblocks\.\d+)\.net\.({BLOCK})", r"\1.\2"),
    (r"model_state_dict\.(visual\.layer[1-4]\.\d+\.conv1)\.net\.(weight)", r"\1.\2"),
    (rf"model_state_dict\.(visual\.(?:{VISUAL}|{TEXT4VIS_VISUAL}))", r"\1"),
)
OPTIMISER: tuple[Rule, ...] = ((r"optimizer(?:_state_dict)?\..*", None),)
# EVL and Vita-CLIP share one re-implementation of the CLIP tower; `{}` is where it sits.
_EVL_TOWER: tuple[Rule, ...] = (
    (r"{}cls_token", "visual.class_embedding"),
    (r"{}pos_embed", "visual.positional_embedding"),
    (rf"{{}}patch_embed\.proj\.({AFFINE})", r"visual.conv1.\1"),
    (rf"{{}}(ln_(?:pre|post)\.{AFFINE}|proj)", r"visual.\1"),
    (
        rf"{{}}blocks\.(\d+)\.(attn\.(?:[qkv]|out)_proj\.{AFFINE})",
        r"visual.transformer.resblocks.\1.\2",
    ),
    (rf"{{}}blocks\.(\d+)\.norm([12])\.({AFFINE})", r"visual.transformer.resblocks.\1.ln_\2.\3"),
    (rf"{{}}blocks\.(\d+)\.mlp\.fc1\.({AFFINE})", r"visual.transformer.resblocks.\1.mlp.c_fc.\2"),
    (rf"{{}}blocks\.(\d+)\.mlp\.fc2\.({AFFINE})", r"visual.transformer.resblocks.\1.mlp.c_proj.\2"),
)


def _evl_tower(prefix: str) -> tuple[Rule, ...]:
    return tuple((pattern.replace("{}", prefix, 1), new) for pattern, new in _EVL_TOWER)


def _hugging_face_blocks(tower: str, root: str) -> tuple[Rule, ...]:
    source = rf"{tower}\.encoder\.layers\.(\d+)\."
    target = rf"{root}transformer.resblocks.\1."
    return (
        (rf"{source}self_attn\.((?:[qkv]|out)_proj\.{AFFINE})", rf"{target}attn.\2"),
        (rf"{source}layer_norm([12])\.({AFFINE})", rf"{target}ln_\2.\3"),
        (rf"{source}mlp\.fc1\.({AFFINE})", rf"{target}mlp.c_fc.\2"),
        (rf"{source}mlp\.fc2\.({AFFINE})", rf"{target}mlp.c_proj.\2"),
    )


HUGGING_FACE_CLIP: tuple[Rule, ...] = (
    (r"logit_scale", "logit_scale"),
    (r"(?:text|vision)_model\.embeddings\.position_ids", None),  # 0, 1, 2, ...
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (rf"vision_model\.pre_layrnorm\.({AFFINE})", r"visual.ln_pre.\1"),  # spelt like this there
    (rf"vision_model\.pre_layernorm\.({AFFINE})", r"visual.ln_pre.\1"),
    (rf"vision_model\.post_layernorm\.({AFFINE})", r"visual.ln_post.\1"),
    (r"visual_projection\.weight", "visual.proj"),  # transposed by the finish
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (rf"text_model\.final_layer_norm\.({AFFINE})", r"ln_final.\1"),
    (r"text_projection\.weight", "text_projection"),  # transposed by the finish
    *_hugging_face_blocks("vision_model", "visual."),
    *_hugging_face_blocks("text_model", ""),
)


def _finish_hugging_face(tensors: Tensors) -> Tensors:
    """Linear layers hold [out, in]; OpenAI's two projections are bare matrices [in, out]."""
    fused = names.fuse_projections(tensors)
    for name in ("visual.proj", "text_projection"):
        if name in fused:
            fused[name] = fused[name].t().contiguous()
    return fused


def _finish_evl(tensors: Tensors) -> Tensors:
    fused = names.drop_zero_patch_bias(names.fuse_projections(tensors))
    weight = fused.get("visual.conv1.weight")
    if weight is not None and weight.ndim == 2:  # EVL flattens it, channel-major: [D, 3 * P * P]
        side = round((weight.shape[1] / 3) ** 0.5)
        if 3 * side * side != weight.shape[1]:
            raise UserError(f"patch_embed.proj.weight {tuple(weight.shape)} is of no square patch")
        fused["visual.conv1.weight"] = weight.unflatten(1, (3, side, side))
    return fused


def _note_temporal_shift(present: Collection[str]) -> dict[str, str]:
    shifted = any(re.search(r"\.(?:resblocks\.\d+|conv1)\.net\.", name) for name in present)
    return {"temporal_module": "tsm"} if shifted else {}


# The table --------------------------------------------------------------------------------------

CLIP_FORMATS = ("openai", "clip_visual", "open_clip", "hf_clip")  # of the following: no method's

FORMATS: tuple[Format, ...] = (
    Format(
        name=OWN_FORMAT,
        summary="KinetiCLIP safetensors, known by its metadata",
        detect=lambda present, values: values.get("format") == OWN_FORMAT,
        rename=((r"(.*)", r"\1"),),
    ),
    Format(
        name="openai",
        summary="CLIP as OpenAI publishes it (TorchScript or state dict); also bare open_clip ViTs",
        detect=having(r"visual\.conv1\.weight$", r"token_embedding\.weight$"),
        rename=OPENAI,
    ),
    Format(
        name="clip_visual",
        summary="the state dict of CLIP's visual tower alone",
        detect=having(
            r"conv1\.weight$", r"class_embedding$|attnpool\.", r"ln_pre\.weight$|layer4\."
        ),
        rename=((rf"({VISUAL})", r"visual.\1"),),
    ),
    Format(
        name="open_clip",
        summary="an open_clip training checkpoint, or its CustomTextCLIP naming",
        detect=having(
            r"(?:state_dict\.)?visual\.conv1\.weight$",
            r"state_dict\.(?:text\.)?token_embedding\.weight$|text\.token_embedding\.weight$",
        ),
        rename=(
            (rf"(?:state_dict\.)?(visual\.{VISUAL})", r"\1"),
            (rf"(?:state_dict\.)?(?:text\.)?({TEXT})", r"\1"),
            (r"(?:state_dict\.)?(logit_scale)", r"\1"),
            (r"(?:.+\.)?attn_mask", None),
            *OPTIMISER,
        ),
    ),
    Format(
        name="text4vis",
        summary="Text4Vis train.py: tower, header, no text tower",
        detect=having(
            r"(?:model_state_dict\.)?visual\.conv1\.weight$",
            r"(?:model_state_dict\.)?logit_scale$",
            lacks=(r"(?:.*\.)?token_embedding\.weight$",),
        ),
        rename=(
            *((pattern.replace(r"model_state_dict\.", r"(?:model_state_dict\.)?", 1), new)
              for pattern, new in TEXT4VIS_TOWER),
            (rf"(?:model_state_dict\.)?(fusion_model\.{BLOCKS})", r"\1"),
            (r"(?:model_state_dict\.)?(fusion_model\.frame_position_embeddings\.weight)", r"\1"),
            (r"(?:model_state_dict\.)?(logit_scale)", r"\1"),
            *OPTIMISER,
        ),
        note=_note_temporal_shift,
    ),
    Format(
        name="nce",
        summary="Text4Vis train_nce.py and BIKE train.py: whole CLIP, header apart",
        detect=having(
            r"model_state_dict\.visual\.conv1\.weight$",
            r"model_state_dict\.token_embedding\.weight$",
            lacks=(r"fusion_model_state_dict\.(?:sentence|query)_fc\.",),
        ),
        rename=(
            *TEXT4VIS_TOWER,
            (rf"model_state_dict\.({TEXT}|logit_scale)", r"\1"),
            (rf"fusion_model_state_dict\.({BLOCKS})", r"fusion_model.\1"),
            (r"fusion_model_state_dict\.(frame_position_embeddings\.weight)", r"fusion_model.\1"),
            *OPTIMISER,
        ),
        note=_note_temporal_shift,
    ),
    Format(
        name="bike",
        summary="BIKE train_attributes.py: whole CLIP and the sentence head",
        detect=having(
            r"model_state_dict\.visual\.conv1\.weight$",
            r"fusion_model_state_dict\.(?:sentence|query)_fc\.",
        ),
        rename=(
            *TEXT4VIS_TOWER,
            (rf"model_state_dict\.({TEXT}|logit_scale)", r"\1"),
            (rf"fusion_model_state_dict\.((?:sentence|query)_fc\.[02]\.{AFFINE})",
             r"fusion_model.\1"),
            *OPTIMISER,
        ),
    ),
    Format(
        name="evl",
        summary="EVL: decoder and head, with the backbone when it was fine-tuned",
        detect=having(
            r"(?:model\.)?(?:decoder\.decoder_layers|backbone\.blocks)\.0\.",
            lacks=(r"(?:model\.)?visual\.",),
        ),
        rename=(
            *_evl_tower(r"(?:model\.)?backbone\."),
            (
                r"(?:model\.)?(decoder\.(?:cls_token"
                rf"|decoder_layers\.\d+\.attn\.(?:[qkv]|out)_proj\.{AFFINE}"
                rf"|decoder_layers\.\d+\.mlp\.fc[12]\.{AFFINE}"
                rf"|decoder_layers\.\d+\.norm[123]\.{AFFINE}"
                rf"|temporal_conv\.\d+\.{AFFINE}"
                r"|temporal_pos_embed\.\d+"
                r"|cross_attention\.\d+\.w[12]))",
                r"\1",
            ),
            (rf"(?:model\.)?(proj\.[02]\.{AFFINE})", r"\1"),
            *OPTIMISER,
        ),
        finish=_finish_evl,
    ),
    Format(
        name="vitaclip",
        summary="Vita-CLIP checkpoint, or its converted CLIP backbone",
        detect=having(
            r"(?:model\.)?visual\.patch_embed\.proj\.weight$", r"(?:model\.)?visual\.blocks\.0\."
        ),
        rename=(
            *_evl_tower(r"(?:model\.)?visual\."),
            (r"(?:model\.)?visual\.(time_embed|global_prompts)", r"prompts.\1"),
            (
                rf"(?:model\.)?visual\.(blocks\.\d+\.(?:local_prompts|{SUMMARY}))",
                r"prompts.\1",
            ),
            (rf"(?:model\.)?textual\.({TEXT})", r"\1"),
            (r"(?:model\.)?(prompt_learner\.(?:ctx|token_prefix|token_suffix))", r"\1"),
            (r"(?:model\.)?(logit_scale)", r"\1"),
            *OPTIMISER,
        ),
        finish=_finish_evl,
    ),
    Format(
        name="hf_clip",
        summary="transformers CLIPModel",
        detect=having(
            r"vision_model\.embeddings\.", r"text_model\.embeddings\.", lacks=(r"mit\.",)
        ),
        rename=HUGGING_FACE_CLIP,
        finish=_finish_hugging_face,
    ),
    Format(
        name="hf_xclip",
        summary="transformers XCLIPModel",
        detect=having(r"vision_model\.embeddings\.", r"mit\.encoder\."),
        rename=(
            *HUGGING_FACE_CLIP,
            *(
                (
                    rf"vision_model\.encoder\.layers\.(\d+)\.{theirs}\.((?:.+_proj\.)?{AFFINE})",
                    rf"prompts.blocks.\1.{ours}.\2",
                )
                for theirs, ours in (
                    ("message_fc", "cls_proj"),
                    ("message_ln", "summary_ln"),
                    ("message_attn", "summary_attn_layer"),
                )
            ),
            (r"(mit\.position_embedding)", r"\1"),
            *_hugging_face_blocks("mit", "mit."),
            (rf"(prompts_visual_layernorm\.{AFFINE}|prompts_visual_projection)", r"\1"),
            (
                rf"(prompts_generator\.(?:layernorm\.{AFFINE}|decoder\.\d+\.(?:gamma|alpha"
                rf"|cross_attn\.(?:[qkv]_proj|proj)\.{AFFINE}|norm[123]\.{AFFINE}"
                rf"|mlp\.\d\.{AFFINE}))|prompts_generator\.alpha)",
                r"\1",
            ),
        ),
        finish=_finish_hugging_face,
    ),
)  # fmt: skip


def identify(contents: Contents, source: str) -> Format:
    """The one format that recognises the contents; UserError when none or several do."""
    present = contents.tensors.keys()
    matching = [entry for entry in FORMATS if entry.detect(present, contents.values)]
    if len(matching) == 1:
        return matching[0]
    first = ", ".join(list(present)[:5]) or "no tensors at all"
    if matching:
        known = ", ".join(entry.name for entry in matching)
        raise UserError(f"{source}: reads as several formats ({known}); first keys: {first}")
    known = ", ".join(entry.name for entry in FORMATS)
    raise UserError(f"{source}: of no known format ({known}); first keys: {first}")


def apply_rules(
    present: Iterable[str], rules: tuple[Rule, ...], source: str, what: str
) -> dict[str, str | None]:
    """name -> new name, or None where it is dropped on purpose.

    Raises UserError for names that no rule mentions and for two names that become one.
    """
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    renamed: dict[str, str | None] = {}
    unknown: list[str] = []
    taken: dict[str, str] = {}
    for name in present:
        for pattern, new in compiled:
            match = pattern.fullmatch(name)
            if match:
                renamed[name] = None if new is None else match.expand(new)
                break
        else:
            unknown.append(name)
            continue
        target = renamed[name]
        if target is not None and taken.setdefault(target, name) != name:
            raise UserError(f"{source}: '{taken[target]}' and '{name}' would both be '{target}'")
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise UserError(f"{source}: {what} has no place for {', '.join(unknown[:8])}{more}")
    return renamed
