"""Numbers that the kernels of several rooms share: precision of products, scales of 8-bit rows."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of products in fp32: three of 19-bit floats, on tensor cores and as good. 16 bits are exact.
PRECISION = tl.constexpr("tf32x3")
E4M3_MAX = tl.constexpr(torch.finfo(torch.float8_e4m3fn).max)


@triton.jit
def row_scale(largest):
    """What rows are divided by to fit in e4m3: their largest magnitude / 448, 1 for zeros."""
    scale = largest / E4M3_MAX
    return tl.where(scale > 0, scale, 1.0)
