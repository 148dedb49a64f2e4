"""Parameters and multiply-adds of X-CLIP and Open-VCLIP; the rules are those of info.py.

Shape letters: N tokens, P = N - 1 patches, D width, L blocks, T frames, E embedding, C classes.
"""

from __future__ import annotations

from dataclasses import replace

from kineticlip.models.architectures import Architecture, VisionShape
from kineticlip.models.cost import Part, mlp_parameters, text, vit


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
