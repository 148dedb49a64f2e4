"""Parameters and multiply-adds, part by part: plain arithmetic over shapes, no model is built.

Three counts stand side by side. `official`: what the official code computes. `ours`: the same
function with work left out that cannot reach the output. `paper`: what the method's paper calls
its FLOPs; all of them count multiply-adds, and Text4Vis's leaves attention out. One multiply-add
is one; torch's FlopCounterMode reports two for it. Biases, norms and activations count nothing.

Shape letters: N tokens, D width, L blocks, T frames, E embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kineticlip.models.architectures import Architecture, ResNetShape, TextShape, VisionShape

POSITIONS = 77  # rows of the temporal header's table
STRIDE = 32  # pixels of a ResNet's input for each position of its last map


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model; multiply-adds are those of one clip, or of one run where `once`.

    trained: how many of the parameters the method trains. in_paper: whether the paper counts it,
    parameters and multiply-adds alike.
    """

    name: str
    parameters: int = 0
    trained: int = 0
    official: int = 0
    ours: int = 0
    in_paper: bool = False
    once: bool = False


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the parts that run for every clip; the text tower, which runs once, is apart."""

    parameters: int
    trained: int
    paper_parameters: int
    official: int
    ours: int
    paper: int


def totals(parts: Sequence[Part]) -> Totals:
    """The sums that papers compare."""
    clip = [part for part in parts if not part.once]
    return Totals(
        parameters=sum(part.parameters for part in clip),
        trained=sum(part.trained for part in parts),
        paper_parameters=sum(part.parameters for part in parts if part.in_paper),
        official=sum(part.official for part in clip),
        ours=sum(part.ours for part in clip),
        paper=sum(part.official for part in clip if part.in_paper),
    )


# Transformer blocks -----------------------------------------------------------------------------


def mlp_parameters(width: int, hidden: int) -> int:
    return 2 * width * hidden + hidden + width


def class_block(width: int, hidden: int, heads: int, tokens: int, *, absorbed: bool = True) -> int:
    """The last block for its class token alone, over `tokens` keys; one image.

    absorbed: keys and values are never projected, as class_attention does it: the query goes
    through both weights, and scores and mixtures are taken over the tokens themselves.
    """
    projected = 2 * width**2 if absorbed else 2 * tokens * width**2  # keys and values
    attended = 2 * heads * tokens * width if absorbed else 2 * tokens * width
    return 2 * width**2 + projected + attended + 2 * width * hidden  # query and output; MLP


def _block_parts(
    prefix: str,
    width: int,
    hidden: int,
    layers: int,
    *,
    tokens: int,
    rows: int,
    trained: bool,
    paper_is_mlp: bool,
) -> list[Part]:
    """Plain self-attention blocks on `rows` sequences of `tokens`; every token is computed."""
    square = width**2
    counts = {
        "q, k, v projections": (3 * (square + width), 3 * tokens * square),
        "attention": (0, 2 * tokens**2 * width),
        "output projections": (square + width, tokens * square),
        "MLPs": (mlp_parameters(width, hidden), 2 * tokens * width * hidden),
        "norms": (4 * width, 0),
    }
    return [
        Part(
            name=f"{prefix} {name}",
            parameters=layers * parameters,
            trained=layers * parameters if trained else 0,
            official=rows * layers * macs,
            ours=rows * layers * macs,
            in_paper=name == "MLPs" or not paper_is_mlp,
        )
        for name, (parameters, macs) in counts.items()
    ]


# Towers -----------------------------------------------------------------------------------------


def vit(
    shape: VisionShape,
    frames: int,
    *,
    trained: bool = True,
    paper_is_mlp: bool = True,
    last_block_whole: bool = False,
    projected: bool = True,
) -> list[Part]:
    """A CLIP ViT on T frames.

    paper_is_mlp: the paper counts the patch convolution and the MLPs only (Text4Vis); else all.
    last_block_whole: every token of the last block is needed (a method taps it).
    projected: ln_post and the projection to E are there.
    """
    n, width, hidden = shape.tokens, shape.width, shape.mlp_width
    patch = 3 * shape.patch**2 * width
    embeddings = width + n * width + 2 * width * (2 if projected else 1)  # class, positions, norms
    parts = [
        Part(
            name="visual patch embedding",
            parameters=patch,
            trained=patch if trained else 0,
            official=frames * (n - 1) * patch,
            ours=frames * (n - 1) * patch,
            in_paper=True,
        ),
        *_block_parts(
            "visual",
            width,
            hidden,
            shape.layers,
            tokens=n,
            rows=frames,
            trained=trained,
            paper_is_mlp=paper_is_mlp,
        ),
        Part(
            name="visual embeddings, outer norms",
            parameters=embeddings,
            trained=embeddings if trained else 0,
            in_paper=not paper_is_mlp,
        ),
    ]
    if projected:
        parts.append(_projection(width * shape.embed, frames, trained, not paper_is_mlp))
    if not last_block_whole:
        whole = sum(part.official for part in parts if part.name in _BLOCK_NAMES) // shape.layers
        saved = frames * class_block(width, hidden, shape.heads, n) - whole
        parts.append(Part(name="visual last block: class token only", ours=saved))
    return parts


_BLOCK_NAMES = {
    "visual q, k, v projections", "visual attention", "visual output projections", "visual MLPs",
}  # fmt: skip


def _projection(weights: int, rows: int, trained: bool, in_paper: bool) -> Part:
    return Part(
        name="visual projection",
        parameters=weights,
        trained=weights if trained else 0,
        official=rows * weights,
        ours=rows * weights,
        in_paper=in_paper,
    )


def resnet(shape: ResNetShape, frames: int, *, trained: bool = True) -> list[Part]:
    """CLIP's modified ResNet on T frames.

    The official attention pool computes every query and keeps the first; ours has one.
    """
    half, width, side = shape.width // 2, shape.width, shape.resolution // 2
    stem = 9 * (3 * half + half * half + half * width)
    stem_macs = side**2 * stem
    parameters, macs, incoming, side = 0, 0, width, side // 2
    for stage, blocks in enumerate(shape.layers):
        inner = width * 2**stage
        for index in range(blocks):
            out = side // 2 if stage and index == 0 else side
            before = incoming * inner + 9 * inner**2  # at the resolution that comes in
            after = 4 * inner**2 + (4 * incoming * inner if index == 0 else 0)  # pooled
            macs += side**2 * before + out**2 * after
            parameters += before + after + (2 + 2 + 8 + (8 if index == 0 else 0)) * inner
            incoming, side = 4 * inner, out
    n, square = side**2 + 1, incoming**2
    pool = n * incoming + 3 * (square + incoming) + incoming * shape.embed + shape.embed
    query = square + 2 * n * incoming + incoming * shape.embed  # projection, attention, output
    counts = (
        ("visual stem", stem + 2 * (half + half + width), stem_macs, stem_macs),
        ("visual bottlenecks", parameters, macs, macs),
        ("visual attention pool", pool, 2 * n * square + n * query, 2 * n * square + query),
    )
    return [
        Part(
            name=name,
            parameters=count,
            trained=count if trained else 0,
            official=frames * official,
            ours=frames * ours,
            in_paper=name != "visual attention pool",
        )
        for name, count, official, ours in counts
    ]


def text(shape: TextShape, sentences: int, *, positions: int | None = None) -> Part:
    """The text tower over some sentences, once; `positions` where they are cut after the last."""
    width, n = shape.width, positions or shape.context
    block = 4 * width**2 + 4 * width + mlp_parameters(width, shape.mlp_width) + 4 * width
    parameters = (
        shape.vocabulary * width
        + shape.context * width
        + shape.layers * block
        + 2 * width
        + width * shape.embed
    )
    official = _sentence(shape, shape.context)
    return Part(
        name="text tower",
        parameters=parameters,
        official=sentences * official,
        ours=sentences * _sentence(shape, n),
        once=True,
    )


def _sentence(shape: TextShape, tokens: int) -> int:
    width = shape.width
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * shape.mlp_width
    return shape.layers * layer + width * shape.embed


# Methods ----------------------------------------------------------------------------------------


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
        *_block_parts(
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
