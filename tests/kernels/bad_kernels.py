"""Kernels that the compilation tests must complain about, and one that is well.

Not a pattern for anything: `test_aot_hopper.py` compiles them to see that its checks can fail.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(
    a_ptr, b_ptr, out_ptr, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):  # a [M, depth], b [depth, N], out [M, N]
    row, column, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], dtype=tl.float32)
    for start in range(0, depth, K):
        a = tl.load(a_ptr + row[:, None] * depth + (start + k)[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + column[None, :])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + row[:, None] * N + column[None, :], total.to(out_ptr.dtype.element_ty))


@triton.jit
def _without_tensor_cores(a_ptr, b_ptr, out_ptr, K: tl.constexpr):  # a [16, K], b [K, 16]
    row, k = tl.arange(0, 16), tl.arange(0, K)
    a = tl.load(a_ptr + row[:, None] * K + k[None, :]).to(tl.float32)
    for column in range(16):
        b = tl.load(b_ptr + k * 16 + column).to(tl.float32)
        tl.store(out_ptr + row * 16 + column, tl.sum(a * b[None, :], axis=1))


@triton.jit
def _narrow(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Every third element: no two loads are neighbours."""
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + 3 * place))


@triton.jit
def _scattered(x_ptr, out_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + 3 * place, tl.load(x_ptr + place))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product(
    m: int, n: int, k: int, *, warps: int, stages: int, dtype: torch.dtype = torch.bfloat16
) -> None:
    operands = meta(m, 1024, dtype=dtype), meta(1024, n, dtype=dtype), meta(m, n)
    _product[(1,)](*operands, 1024, M=m, N=n, K=k, num_warps=warps, num_stages=stages)


CASES = {
    "spills": lambda: product(256, 256, 64, warps=4, stages=2),
    "too much shared memory": lambda: product(128, 256, 64, warps=8, stages=6),
    "endless 8-bit sum": lambda: product(
        128, 128, 128, warps=8, stages=2, dtype=torch.float8_e4m3fn
    ),
    "good": lambda: product(128, 128, 64, warps=8, stages=3),
    "no tensor cores": lambda: _without_tensor_cores[(1,)](
        meta(16, 64), meta(64, 16), meta(16, 16, dtype=torch.float32), K=64
    ),
    "narrow loads": lambda: _narrow[(1,)](meta(3072), meta(1024), BLOCK=1024),
    "narrow stores": lambda: _scattered[(1,)](meta(1024), meta(3072), BLOCK=1024),
}

KINDS = {
    "bad_kernels._product": "matrix",
    "bad_kernels._without_tensor_cores": "matrix",
    "bad_kernels._narrow": "memory",
    "bad_kernels._scattered": "stores",
}
