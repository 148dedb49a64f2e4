"""Parameters and multiply-adds of X-CLIP; models/cost.py says how they are counted.

Shape letters: N tokens, P = N - 1 patches, D width, L blocks, T frames, E embedding, C classes.
"""

from __future__ import annotations

from kineticlip.config import Config
from kineticlip.methods.trunk import vit_of
from kineticlip.models.architectures import Architecture, VisionShape
from kineticlip.models.cost import Part, mlp_parameters, text, vit, with_training


def cost(config: Config, model: Architecture, classes: int) -> list[Part]:
    """Message tokens, frame integration, text that looks at each video's patches.

    The paper counts everything that runs for a clip. Ours leaves out queries and outputs of the
    message tokens, and projects patches after their mean over time.
    """
    options, frames, embed = config.xclip, config.data.num_frames, model.embed
    shape = vit_of(model, "X-CLIP")
    layers = options.integration_layers
    integration = layers * (12 * frames * embed**2 + 2 * frames**2 * embed)
    tower = with_training([text(model.text, classes)], lambda part: options.train_text)
    return [
        *vit(shape, frames, paper_is_mlp=False, last_block_whole=True),
        *_messages(shape, frames),
        _part("frame integration", frames * embed + layers * _block_parameters(embed), integration),
        *_conditioned_text(shape, frames, classes=classes, layers=options.prompt_layers),
        _part("class scores", 0, classes * embed),
        _part("logit scale", 1, 0),
        *tower,
    ]


def _messages(shape: VisionShape, frames: int) -> list[Part]:
    """One message token a frame and block, and what it costs the frame's own attention."""
    n, width, depth, square = shape.tokens, shape.width, shape.layers, shape.width**2
    message = depth * frames * (5 * square + 2 * frames * width)  # projection and attention
    longer = 4 * square + 2 * ((n + 1) ** 2 - n**2) * width
    return [
        _part("message tokens", depth * (5 * (square + width) + 2 * width), message),
        Part(
            name="message tokens as keys and values",
            official=depth * frames * longer,
            ours=depth * frames * (2 * square + 2 * n * width),
            in_paper=True,
        ),
    ]


def _conditioned_text(shape: VisionShape, frames: int, *, classes: int, layers: int) -> list[Part]:
    """Patches brought to the width of the text, and the text's cross-attention to them."""
    patches, width, embed = shape.tokens - 1, shape.width, shape.embed
    projection = 2 * width + width * embed
    layer = 4 * embed**2 + 5 * embed + mlp_parameters(embed, 4 * embed)
    macs = 10 * classes * embed**2 + 2 * patches * embed**2 + 2 * classes * patches * embed
    return [
        Part(
            name="patches for the text",
            parameters=projection,
            trained=projection,
            official=frames * patches * width * embed,
            ours=patches * width * embed,
            in_paper=True,
        ),
        _part("text looking at patches", 3 * embed + layers * layer, layers * macs),
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
