"""The matrix product that mlp and fp8 put their epilogues behind.

Shape letters: R rows, D width in, F width out.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(
    x_ptr,  # [R, D], rows x_stride apart
    weight_ptr,  # [F, D]
    row,  # of x, a block
    column,  # of the product, a block
    x_stride,
    rows,
    F,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x @ weight.T of one tile, fp32 [rows, columns]; garbage behind the last of either."""
    k = tl.arange(0, BLOCK_K)
    # Rows and columns behind the end read real ones again: no mask in the loop, and no store.
    x_ptr += (row % rows).to(tl.int64)[:, None] * x_stride + k[None, :]
    weight_ptr += (column % F).to(tl.int64)[None, :] * D + k[:, None]
    total = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            x = tl.load(x_ptr + start)
            weight = tl.load(weight_ptr + start)
        else:
            x = tl.load(x_ptr + start, mask=k[None, :] < D - start, other=0.0)
            weight = tl.load(weight_ptr + start, mask=k[:, None] < D - start, other=0.0)
        # Not total = dot(x, weight, total): sm_90 adds e4m3 products with fewer bits than fp32 has,
        # and would keep the sum of all D of them so. This way fp32 takes it over every BLOCK_K,
        # for one wait on four QGMMA; max_num_imprecise_acc waits behind each of them. Products of
        # 16 bits are folded back into the same code as ever.
        total += tl.dot(x, weight, input_precision="ieee")
    return total


@triton.jit
def tile_of(
    program, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """Program number -> its rows and columns: GROUP_M tiles of rows share columns while in L2."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    row = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, within // height * BLOCK_N + tl.arange(0, BLOCK_N)
