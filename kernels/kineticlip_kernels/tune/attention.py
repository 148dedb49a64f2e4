"""Attention of the trunk, of its class token, and between frames."""

from __future__ import annotations

from functools import partial

from kineticlip_kernels import attention, temporal
from kineticlip_kernels.tune.search import Target, grid
from kineticlip_kernels.tune.shapes import Sizes, backward_of, forward_of


def attention_targets(at: Sizes) -> tuple[Target, ...]:
    attend = partial(attention.attention, impl="triton")
    attend_class = partial(attention.class_attention, heads=at.heads, impl="triton")
    attend_frames = partial(temporal.frame_attention, impl="triton")
    head_width = at.width // at.heads
    qkv = (at.frames, at.tokens, 3, at.heads, head_width)
    video = (at.clips, at.frames, 3, at.heads, head_width)
    block = ((at.frames, at.tokens, at.width), (3 * at.width, at.width), (3 * at.width,))
    tiles = grid(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(2, 3))
    widths, forward, backward = {"head_width": head_width}, forward_of, backward_of
    return (
        Target("attention_forward", widths, forward(attend, qkv), tiles),
        Target(
            "attention_backward_delta",
            widths,
            backward(attend, qkv),
            grid(BLOCK_ROWS=(32, 64, 128), num_warps=(4, 8)),
        ),
        Target("attention_backward_keys", widths, backward(attend, qkv), tiles),
        Target("attention_backward_queries", widths, backward(attend, qkv), tiles),
        Target(
            "class_attention_forward",
            {"width": at.width},
            forward(attend_class, *block),
            grid(BLOCK_N=(16, 32, 64), num_warps=(8, 16), num_stages=(1, 2)),
        ),
        Target(
            "class_attention_backward",
            {"width": at.width},
            backward(attend_class, *block),
            grid(BLOCK_N=(16, 32), num_warps=(8, 16), num_stages=(1,)),
        ),
        Target(
            "frame_attention",
            {"frames": at.frames, "itemsize": 2},
            forward(attend_frames, video),
            grid(num_warps=(1, 2, 4)),
        ),
        Target(
            "frame_attention_backward",
            {"frames": at.frames, "itemsize": 2},
            backward(attend_frames, video),
            grid(num_warps=(2, 4, 8)),
        ),
    )
