"""Parameters and multiply-adds of EVL; models/cost.py says how they are counted.

Shape letters: T frames, N tokens, D width, C classes.
"""

from __future__ import annotations

from kineticlip.config import Config
from kineticlip.methods.evl_decoder import DecoderShape, decoder_shape
from kineticlip.methods.trunk import vit_of
from kineticlip.models.architectures import Architecture
from kineticlip.models.cost import Part, mlp_parameters, vit, with_training


def cost(config: Config, model: Architecture, classes: int) -> list[Part]:
    """The backbone, frozen unless evl.finetune says otherwise, and the decoder.

    The paper's count is the backbone and the key and value projections.
    """
    shape = decoder_shape(config.evl, vit_of(model, "EVL"), config.data.num_frames)
    backbone = vit(
        shape.trunk,
        shape.frames,
        trained=config.evl.finetune,
        paper_is_mlp=False,
        last_block_whole=True,
        projected=False,
    )
    return [*backbone, *with_training(decoder_cost(shape, classes), lambda part: True)]


def decoder_cost(shape: DecoderShape, classes: int) -> list[Part]:
    """One query through decoder layers over the last blocks' tokens, and the head.

    Ours never projects keys and values: the query does, once for each head.
    """
    width, qkv_dim, layers = shape.trunk.width, shape.qkv_dim, shape.layers
    tokens = shape.frames * shape.trunk.tokens
    projections = 2 * width * qkv_dim
    query_macs = 2 * width * qkv_dim + 2 * width * shape.mlp_width
    query_parameters = projections + qkv_dim + width + mlp_parameters(width, shape.mlp_width)
    return [
        Part(
            name="decoder key, value projections",
            parameters=layers * (projections + 2 * qkv_dim),
            official=layers * tokens * projections,
            ours=layers * (projections + 2 * shape.heads * tokens * width),
            in_paper=True,
        ),
        Part(
            name="decoder queries, MLPs, norms",
            parameters=width + layers * (query_parameters + 6 * width),
            official=layers * (query_macs + 2 * tokens * qkv_dim),
            ours=layers * query_macs,
        ),
        *_temporal_terms(shape),
        Part(
            name="head",
            parameters=2 * width + (width + 1) * classes,
            official=width * classes,
            ours=width * classes,
        ),
    ]


def _temporal_terms(shape: DecoderShape) -> list[Part]:
    """Those that the configuration adds to the tokens."""
    width, frames, n = shape.trunk.width, shape.frames, shape.trunk.tokens
    maps = 4 * (frames - 1) * (n - 1) ** 2 * width  # two directions: scores, and their sums
    terms = (
        (shape.conv, "temporal convolutions", 4 * width, 3 * frames * n * width),
        (shape.position, "temporal positions", frames * width, 0),
        (shape.attention, "temporal attention", 2 * shape.offsets * width, maps),
    )
    return [
        Part(
            name=f"decoder {name}",
            parameters=shape.layers * parameters,
            official=shape.layers * macs,
            ours=shape.layers * macs,
        )
        for wanted, name, parameters, macs in terms
        if wanted
    ]
