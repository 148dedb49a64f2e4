"""Parameters and multiply-adds of X-CLIP and Open-VCLIP; the rules are those of info.py.

Shape letters: N tokens, P = N - 1 patches, D width, L blocks, T frames, E embedding, C classes.
"""

from __future__ import annotations

from dataclasses import replace

from kineticlip.models.architectures import Architecture, ResNetShape, VisionShape
from kineticlip.models.cost import (
    Part,
    block_parts,
    class_block,
    mlp_parameters,
    resnet,
    text,
    vit,
)


def xclip(
    model: Architecture,
    frames: int,
    *,
    classes: int,
    integration_layers: int = 1,
    prompt_layers: int = 2,
    train_text: bool = False,
) -> list[Part]:
    """X-CLIP: message tokens, frame integration, text that looks at each video's patches.

    Its paper counts everything that runs for a clip. Ours leaves out queries and outputs of the
    message tokens, and projects patches after their mean over time.
    """
    shape = model.vision
    assert isinstance(shape, VisionShape)
    n, width, embed, depth = shape.tokens, shape.width, model.embed, shape.layers
    square, patches = width**2, n - 1
    message = depth * frames * (5 * square + 2 * frames * width)  # projection and attention
    longer = 4 * square + 2 * ((n + 1) ** 2 - n**2) * width
    parts = [
        *vit(shape, frames, paper_is_mlp=False, last_block_whole=True),
        _part("message tokens", depth * (5 * (square + width) + 2 * width), message),
        Part(
            name="message tokens as keys and values",
            official=depth * frames * longer,
            ours=depth * frames * (2 * square + 2 * n * width),
            in_paper=True,
        ),
        _part(
            "frame integration",
            frames * embed + integration_layers * _block_parameters(embed),
            integration_layers * (12 * frames * embed**2 + 2 * frames**2 * embed),
        ),
        Part(
            name="patches for the text",
            parameters=2 * width + width * embed,
            trained=2 * width + width * embed,
            official=frames * patches * width * embed,
            ours=patches * width * embed,
            in_paper=True,
        ),
        _part(
            "text looking at patches",
            3 * embed
            + prompt_layers * (4 * embed**2 + 5 * embed + mlp_parameters(embed, 4 * embed)),
            prompt_layers
            * (10 * classes * embed**2 + 2 * patches * embed**2 + 2 * classes * patches * embed),
        ),
        _part("class scores", 0, classes * embed),
        _part("logit scale", 1, 0),
    ]
    tower = text(model.text, classes)
    return [*parts, replace(tower, trained=tower.parameters if train_text else 0)]


def openvclip(model: Architecture, frames: int, *, sentences: int) -> list[Part]:
    """Open-VCLIP: CLIP's tower with the keys and values of three frames; the text is frozen.

    Ours computes output and MLP of the last block for the class token alone.
    """
    shape = model.vision
    assert isinstance(shape, VisionShape)
    n, width, hidden = shape.tokens, shape.width, shape.mlp_width
    more = frames * shape.layers * 4 * n**2 * width
    saved = frames * (n - 1) * (width**2 + 2 * width * hidden)
    return [
        *vit(shape, frames, paper_is_mlp=False, last_block_whole=True),
        _part("attention to neighbouring frames", 0, more),
        Part(name="visual last block: class token only", ours=-saved),
        _part("logit scale", 1, 0),
        text(model.text, sentences),
    ]


def _part(name: str, parameters: int, macs: int) -> Part:
    """One that trains, and costs the same officially and here."""
    return Part(
        name=name,
        parameters=parameters,
        trained=parameters,
        official=macs,
        ours=macs,
        in_paper=True,
    )


def _block_parameters(width: int) -> int:
    return 4 * (width**2 + width) + mlp_parameters(width, 4 * width) + 4 * width


POSITIONS = 77  # rows of the temporal header's table


def text4vis(
    model: Architecture, frames: int, *, header_layers: int = 6, whole_frames: bool = False
) -> list[Part]:
    """Text4Vis: tower, temporal header (0 layers: mean), logit scale.

    The classifier, C * E multiply-adds for a video, is not counted, nor is it in the paper.
    whole_frames: the last block is computed for every token.
    """
    shape = model.vision
    if isinstance(shape, ResNetShape):
        parts = resnet(shape, frames)
    else:
        parts = vit(shape, frames, last_block_whole=whole_frames)
    if header_layers:
        parts += header(model.embed, frames, layers=header_layers)
    return [*parts, Part(name="logit scale", parameters=1, trained=1)]


def header(embed: int, frames: int, *, layers: int = 6) -> list[Part]:
    """The temporal transformer over T frame embeddings."""
    positions = POSITIONS * embed
    return [
        *block_parts(
            "header",
            embed,
            4 * embed,
            layers,
            tokens=frames,
            rows=1,
            trained=True,
            paper_is_mlp=True,
        ),
        Part(name="header positions", parameters=positions, trained=positions),
    ]


def evl(
    shape: VisionShape,
    frames: int,
    *,
    classes: int,
    layers: int = 4,
    qkv_dim: int = 768,
    heads: int = 12,
    mlp_factor: float = 4.0,
    temporal_conv: bool = True,
    temporal_positions: bool = True,
    temporal_attention: bool = True,
) -> list[Part]:
    """EVL: frozen backbone, one query through decoder layers over the last blocks' tokens.

    The paper's count is the backbone and the key and value projections. Ours never projects keys
    and values: the query does, once for each head.
    """
    n, width, tokens = shape.tokens, shape.width, frames * shape.tokens
    hidden = round(mlp_factor * width)
    projections = 2 * width * qkv_dim
    maps = 4 * (frames - 1) * (n - 1) ** 2 * width  # two directions: scores, and their sums
    attention = Part(
        name="decoder key, value projections",
        parameters=layers * (projections + 2 * qkv_dim),
        official=layers * tokens * projections,
        ours=layers * (projections + 2 * heads * tokens * width),
        in_paper=True,
    )
    query_macs = 2 * width * qkv_dim + 2 * width * hidden
    query = Part(
        name="decoder queries, MLPs, norms",
        parameters=width
        + layers * (projections + qkv_dim + width + mlp_parameters(width, hidden) + 6 * width),
        official=layers * (query_macs + 2 * tokens * qkv_dim),
        ours=layers * query_macs,
    )
    optional = (
        (temporal_conv, "temporal convolutions", 4 * width, 3 * tokens * width),
        (temporal_positions, "temporal positions", frames * width, 0),
        (temporal_attention, "temporal attention", 2 * (2 * shape.grid - 1) ** 2 * width, maps),
    )
    decoder = [
        attention,
        query,
        *(
            Part(
                name=f"decoder {name}",
                parameters=layers * parameters,
                official=layers * macs,
                ours=layers * macs,
            )
            for wanted, name, parameters, macs in optional
            if wanted
        ),
        Part(
            name="head",
            parameters=2 * width + (width + 1) * classes,
            official=width * classes,
            ours=width * classes,
        ),
    ]
    backbone = vit(
        shape,
        frames,
        trained=False,
        paper_is_mlp=False,
        last_block_whole=True,
        projected=False,
    )
    return [*backbone, *(_all_trained(part) for part in decoder)]


def _all_trained(part: Part) -> Part:
    return Part(**{**part.__dict__, "trained": part.parameters})


def vitaclip(
    model: Architecture,
    frames: int,
    *,
    classes: int,
    summary: bool = True,
    local: bool = True,
    global_prompts: int = 8,
    context: int = 8,
    per_class: bool = True,
    train_cls_proj: bool = False,
    absorbed: bool = True,
) -> list[Part]:
    """Vita-CLIP: frozen CLIP towers, prompts that serve as keys and values.

    The official code carries prompt tokens through whole blocks; ours projects them to keys and
    values only, those of the global prompts once for all clips. absorbed: see class_block.
    """
    shape = model.vision
    assert isinstance(shape, VisionShape)
    n, width, hidden, depth = shape.tokens, shape.width, shape.mlp_width, shape.layers
    extra = (frames if local else 0) + global_prompts + (1 if summary else 0)
    square = width**2
    parts = vit(shape, frames, trained=False, paper_is_mlp=False, last_block_whole=True)
    # Official: the whole sequence through attention, class, global and patch tokens through MLPs.
    longer = n + extra
    official = (
        4 * extra * square + 2 * (longer**2 - n**2) * width + 2 * global_prompts * width * hidden
    )
    ours = 2 * n * extra * width + 2 * ((1 if local else 0) + (1 if summary else 0)) * square
    plain = 4 * n * square + 2 * n * longer * width + 2 * n * width * hidden
    last = class_block(width, hidden, shape.heads, longer, absorbed=absorbed)
    # The prompts' projections are in `ours` above; absorbed, the last block has none.
    last -= 2 * ((1 if local else 0) + (1 if summary else 0) if absorbed else extra) * square
    attention = depth * 4 * (square + width)
    prompts = depth * global_prompts * width + (depth * frames * width if local else 0)
    own = Part(
        name="prompts as keys and values",
        parameters=prompts,
        trained=prompts,
        official=frames * depth * official,
        ours=frames * depth * ours,
    )
    parts += [
        own,
        Part(name="visual last block: class token only", ours=frames * (last - plain)),
        Part(name="frames averaged, then projected", ours=(1 - frames) * width * shape.embed),
        Part(name="time embedding", parameters=frames * width, trained=frames * width),
    ]
    if global_prompts:
        shared = (depth - (1 if absorbed else 0)) * 2 * global_prompts * square
        parts.append(Part(name="global prompts as keys and values", ours=shared, once=True))
    if summary or local:
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
    if summary:
        macs = depth * frames * (4 * square + 2 * frames * width)
        parts.append(
            Part(
                name="summary attention",
                parameters=attention + depth * 2 * width,
                trained=attention + depth * 2 * width,
                official=macs,
                ours=macs,
            )
        )
    learned = context * model.text.width * (classes if per_class else 1)
    return [
        *parts,
        text(model.text, classes),
        Part(name="text prompts", parameters=learned, trained=learned),
        Part(name="logit scale", parameters=1, trained=1),
    ]
