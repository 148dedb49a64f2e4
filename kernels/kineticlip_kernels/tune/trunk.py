"""LayerNorm, the MLP and the 8-bit linear layer of a trunk of one video."""

from __future__ import annotations

from functools import partial

import torch

from kineticlip_kernels import fp8, mlp, norm
from kineticlip_kernels.tune.search import Run, Target, grid
from kineticlip_kernels.tune.shapes import Sizes, backward_of, forward_of, randn, recording


def trunk_targets(at: Sizes) -> tuple[Target, ...]:
    add_layer_norm = partial(norm.add_layer_norm, impl="triton")
    bias_quick_gelu = partial(mlp.bias_quick_gelu, impl="triton")
    linear_quick_gelu = partial(mlp.linear_quick_gelu, impl="triton")
    stream = ((at.rows, at.width), (at.rows, at.width), (at.width,), (at.width,))
    hidden = ((at.rows, 4 * at.width), (4 * at.width,))
    linear = ((at.rows, at.width), (4 * at.width, at.width), (4 * at.width,))
    tiles = grid(
        BLOCK_M=(128, 256), BLOCK_N=(128, 256), BLOCK_K=(64,), GROUP_M=(8,), num_warps=(4, 8),
        num_stages=(3, 4),
    )  # fmt: skip
    tiles_fp8 = grid(
        BLOCK_M=(128,), BLOCK_N=(128, 256), BLOCK_K=(64, 128), GROUP_M=(8,), num_warps=(4, 8),
        num_stages=(3, 4),
    )  # fmt: skip

    def quantize(device: torch.device) -> Run:
        return partial(fp8.quantize_rows, randn(at.rows, at.width, device=device), impl="triton")

    def multiply_fp8(device: torch.device) -> Run:
        x = fp8.quantize_rows(randn(at.rows, at.width, device=device))
        weight = fp8.quantize_rows(randn(4 * at.width, at.width, device=device))
        return partial(fp8.linear_fp8, x, weight, impl="triton")

    row_bytes, rows = {"row_bytes": 2 * at.width}, {"rows": at.rows}
    return (
        Target(
            "layer_norm_forward",
            row_bytes,
            forward_of(add_layer_norm, *stream),
            grid(BLOCK_ROWS=(1, 2, 4, 8), num_warps=(2, 4, 8)),
        ),
        Target(
            "layer_norm_backward",
            row_bytes,
            backward_of(add_layer_norm, *stream),
            grid(BLOCK_ROWS=(1, 2, 4), PROGRAMS=(264, 528, 1056), num_warps=(4, 8)),
        ),
        Target(
            "bias_quick_gelu_forward",
            {"width": 4 * at.width},
            forward_of(bias_quick_gelu, *hidden),
            grid(BLOCK_ROWS=(1, 2, 4), BLOCK_F=(1024, 2048), num_warps=(4, 8)),
        ),
        Target(
            "bias_quick_gelu_backward",
            {"width": 4 * at.width},
            backward_of(bias_quick_gelu, *hidden),
            grid(BLOCK_ROWS=(2, 4, 8), BLOCK_F=(256, 512), PROGRAMS=(132, 264), num_warps=(4, 8)),
        ),
        Target(
            "linear_quick_gelu", rows | {"keep": 0}, forward_of(linear_quick_gelu, *linear), tiles
        ),
        Target(
            "linear_quick_gelu", rows | {"keep": 1}, recording(linear_quick_gelu, *linear), tiles
        ),
        Target("quantize_rows", {"width": at.width}, quantize, grid(num_warps=(1, 2, 4))),
        Target("linear_fp8", rows, multiply_fp8, tiles_fp8),
    )
