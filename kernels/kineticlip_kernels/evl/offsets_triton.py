"""Where the weight of two patches stands, in Triton: `offsets` of a block. Letters: see ops.py."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def offset_of(query, key, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The weight row of a query patch and a block of key patches."""
    dy = query // COLUMNS - key // COLUMNS + ROWS - 1
    dx = query % COLUMNS - key % COLUMNS + COLUMNS - 1
    return dy * (2 * COLUMNS - 1) + dx
