"""Parameters and multiply-adds of Vita-CLIP; models/cost.py says how they are counted.

Shape letters: T frames, N tokens, D width, L blocks, G global prompts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kineticlip.config import Config, VitaConfig
from kineticlip.methods.prompts_text import clean
from kineticlip.methods.trunk import vit_of
from kineticlip.models.architectures import Architecture, VisionShape
from kineticlip.models.cost import Part, class_block, text, vit


def cost(config: Config, model: Architecture, classes: int) -> list[Part]:
    """Frozen CLIP towers, prompts that serve as keys and values, learned words."""
    options = config.vitaclip
    learned = _words(options) * model.text.width * (1 if _shared(options) else classes)
    words = Part(name="text prompts", parameters=learned, trained=learned)
    return [
        *clip_cost(options, vit_of(model, "Vita-CLIP"), config.data.num_frames),
        text(model.text, classes),
        *([words] if options.text == "prompts" else []),
        Part(name="logit scale", parameters=1, trained=1),
    ]


def clip_cost(
    options: VitaConfig, shape: VisionShape, frames: int, *, absorbed: bool = True
) -> list[Part]:
    """The visual side: T frames of a clip, and their prompts.

    The official code carries prompt tokens through whole blocks; ours projects them to keys and
    values only, those of the global prompts once for all clips. absorbed: see class_block.
    """
    prompts = _Prompts.of(options, frames)
    embedding = frames * shape.width
    return [
        *vit(shape, frames, trained=False, paper_is_mlp=False, last_block_whole=True),
        _keys_and_values(shape, prompts),
        _last_block(shape, prompts, absorbed=absorbed),
        Part(name="frames averaged, then projected", ours=(1 - frames) * shape.width * shape.embed),
        Part(name="time embedding", parameters=embedding, trained=embedding),
        *_global_prompts(shape, prompts, absorbed=absorbed),
        *_class_token_layers(shape, prompts, train_cls_proj=options.train_cls_proj),
    ]


@dataclass(frozen=True, kw_only=True)
class _Prompts:
    """Prompt tokens that one frame sees in a block. own: rows that each frame projects itself."""

    frames: int
    local: int
    shared: int
    summary: int
    own: int

    @classmethod
    def of(cls, options: VitaConfig, frames: int) -> _Prompts:
        return cls(
            frames=frames,
            local=frames if options.local_prompts else 0,
            shared=options.global_prompts,
            summary=int(options.summary),
            own=int(options.local_prompts) + int(options.summary),
        )

    @property
    def tokens(self) -> int:
        return self.local + self.shared + self.summary


def _keys_and_values(shape: VisionShape, prompts: _Prompts) -> Part:
    """The learned prompts of all blocks, and what they cost the frames' attention.

    Official: the whole sequence through attention; class, global and patch tokens through MLPs.
    """
    n, width, square = shape.tokens, shape.width, shape.width**2
    extra, longer = prompts.tokens, shape.tokens + prompts.tokens
    mlps = 2 * prompts.shared * width * shape.mlp_width
    official = 4 * extra * square + 2 * (longer**2 - n**2) * width + mlps
    ours = 2 * n * extra * width + 2 * prompts.own * square
    parameters = shape.layers * (prompts.shared + prompts.local) * width
    return Part(
        name="prompts as keys and values",
        parameters=parameters,
        trained=parameters,
        official=prompts.frames * shape.layers * official,
        ours=prompts.frames * shape.layers * ours,
    )


def _last_block(shape: VisionShape, prompts: _Prompts, *, absorbed: bool) -> Part:
    """What the class token alone saves there."""
    n, width, hidden = shape.tokens, shape.width, shape.mlp_width
    longer = n + prompts.tokens
    plain = 4 * n * width**2 + 2 * n * longer * width + 2 * n * width * hidden
    last = class_block(width, hidden, shape.heads, longer, absorbed=absorbed)
    # The prompts' projections are counted with the prompts; absorbed, the last block has none.
    last -= 2 * (prompts.own if absorbed else prompts.tokens) * width**2
    return Part(name="visual last block: class token only", ours=prompts.frames * (last - plain))


def _global_prompts(shape: VisionShape, prompts: _Prompts, *, absorbed: bool) -> list[Part]:
    if not prompts.shared:
        return []
    blocks = shape.layers - (1 if absorbed else 0)
    macs = blocks * 2 * prompts.shared * shape.width**2
    return [Part(name="global prompts as keys and values", ours=macs, once=True)]


def _class_token_layers(
    shape: VisionShape, prompts: _Prompts, *, train_cls_proj: bool
) -> list[Part]:
    """What summary and local prompts take from the class tokens of a clip's frames."""
    depth, width, frames = shape.layers, shape.width, prompts.frames
    square, parts = width**2, []
    if prompts.own:
        linear = depth * (square + width)
        parts.append(
            Part(
                name="class token projections",
                parameters=linear,
                trained=linear if train_cls_proj else 0,
                official=depth * frames * square,
                ours=depth * frames * square,
            )
        )
    if prompts.summary:
        attention = depth * 4 * (square + width) + depth * 2 * width  # and its norm
        macs = depth * frames * (4 * square + 2 * frames * width)
        parts.append(
            Part(
                name="summary attention",
                parameters=attention,
                trained=attention,
                official=macs,
                ours=macs,
            )
        )
    return parts


def _words(options: VitaConfig) -> int:
    """Learned words of one prompt."""
    return len(clean(options.context_words).split()) or options.context


def _shared(options: VitaConfig) -> bool:
    """Whether all classes share them."""
    return bool(options.context_words) or not options.per_class
