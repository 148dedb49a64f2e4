"""EVL's decoder on one video."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kineticlip_kernels import evl
from kineticlip_kernels.tune.search import Target, grid
from kineticlip_kernels.tune.shapes import Sizes, backward_of, forward_of


def evl_targets(at: Sizes) -> tuple[Target, ...]:
    return (*_maps(at), *_displacement(at), *_tokens(at))


def _maps(at: Sizes) -> tuple[Target, ...]:
    neighbours = partial(evl.neighbour_maps, impl="triton")
    queries = (1, at.frames, at.tokens, at.heads, at.width // at.heads)
    pairs = grid(BLOCK_P=(64, 128), BLOCK_R=(64, 128), num_warps=(4, 8), num_stages=(2, 3))
    return (
        Target("neighbour_log_sums", {}, forward_of(neighbours, queries, queries), pairs),
        Target("neighbour_maps", {}, forward_of(neighbours, queries, queries), pairs),
        Target("neighbour_gradients", {}, backward_of(neighbours, queries, queries), pairs),
    )


def _displacement(at: Sizes) -> tuple[Target, ...]:
    displace = partial(evl.displacement, grid=(at.side, at.side), impl="triton")
    offsets = (2 * at.side - 1) ** 2
    maps = ((2, 1, at.frames - 1, at.patches, at.patches), *2 * ((offsets, at.width),))
    return (
        Target(
            "displacement",
            {"images": at.frames, "itemsize": 2},
            forward_of(displace, *maps),
            grid(BLOCK_C=(64, 128), BLOCK_L=(16, 32), BLOCK_R=(64,), num_warps=(4, 8),
                 num_stages=(3, 4)),
        ),
        Target(
            "displacement_maps",
            {"images": at.frames - 1, "itemsize": 2},
            backward_of(displace, *maps),
            grid(BLOCK_R=(64, 128), BLOCK_L=(16, 32), BLOCK_C=(64,), num_warps=(4, 8),
                 num_stages=(3, 4)),
        ),
        Target(
            "displacement_weights",
            {"itemsize": 2},
            backward_of(displace, *maps),
            grid(BLOCK_C=(64, 128), BLOCK_L=(32, 64), num_warps=(4, 8), num_stages=(2, 3)),
        ),
    )  # fmt: skip


def _tokens(at: Sizes) -> tuple[Target, ...]:
    shapes = (
        (1, at.heads, at.width),
        (1, at.frames, at.tokens, at.width),
        (at.width, 1, 3),
        (at.width,),
        (at.frames, at.width),
        (1, at.frames, at.patches, at.width),
    )
    columns = grid(BLOCK_N=(32, 64), BLOCK_C=(64, 128), num_warps=(4, 8), num_stages=(2, 3))
    return (
        Target("attend_tokens_scores", {}, forward_of(_attend, *shapes), columns),
        Target("attend_tokens_mix", {}, forward_of(_attend, *shapes), columns),
        Target(
            "attend_tokens_gradients",
            {},
            backward_of(_attend, *shapes),
            grid(BLOCK_N=(16, 32), BLOCK_C=(64, 128), num_warps=(4, 8), num_stages=(2,)),
        ),
        Target(
            "attend_tokens_input",
            {},
            backward_of(_attend, *shapes),
            grid(BLOCK_N=(4, 8, 16), BLOCK_C=(128, 256), num_warps=(4, 8)),
        ),
    )


def _attend(query: Tensor, tokens: Tensor, *terms: Tensor) -> Tensor:
    weight, bias, position, motion = terms
    return evl.attend_tokens(
        query,
        tokens,
        conv_weight=weight,
        conv_bias=bias,
        position=position,
        motion=motion,
        impl="triton",
    )
