"""Parameters and multiply-adds, part by part: plain arithmetic over shapes, no model is built.

Three counts stand side by side. `official`: what the official code computes. `ours`: the same
function with work left out that cannot reach the output. `paper`: what the method's paper calls
its FLOPs; all of them count multiply-adds, and Text4Vis's leaves attention out. One multiply-add
is one; torch's FlopCounterMode reports two for it. Biases, norms and activations count nothing.

Shape letters: N tokens, D width, L blocks, T frames, E embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kineticlip.models.architectures import ResNetShape, TextShape, VisionShape

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


def with_training(parts: Sequence[Part], trains: Callable[[Part], bool]) -> list[Part]:
    """The same parts; of those that train all parameters do, of the others none."""
    return [replace(part, trained=part.parameters if trains(part) else 0) for part in parts]


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


def block_parts(
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
        *block_parts(
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
        parts.append(projection(width * shape.embed, frames, trained, not paper_is_mlp))
    if not last_block_whole:
        whole = sum(part.official for part in parts if part.name in _BLOCK_NAMES) // shape.layers
        saved = frames * class_block(width, hidden, shape.heads, n) - whole
        parts.append(Part(name="visual last block: class token only", ours=saved))
    return parts


_BLOCK_NAMES = {
    "visual q, k, v projections", "visual attention", "visual output projections", "visual MLPs",
}  # fmt: skip


def projection(weights: int, rows: int, trained: bool, in_paper: bool) -> Part:
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
