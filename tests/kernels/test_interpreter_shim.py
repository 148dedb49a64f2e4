"""The repaired interpreter rounds bf16 and e4m3 to the same bits as PyTorch."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from interpreter_shim import round_to_bf16, round_to_e4m3, widen_bf16
from kernel_rig import BF16, FP32
from torch import Tensor


def awkward() -> Tensor:
    """Halfway cases of bf16 and of e4m3, subnormals, zeros, and ordinary numbers."""
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-4, 1 + 3 * 2**-4, 17.0, 19.0, 2.0**-10])
    return torch.cat([ties, -ties, torch.zeros(1), torch.randn(200) * 20])


def test_rounding_is_torch_s() -> None:
    x = awkward()
    bits = x.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(round_to_bf16(x.numpy()), bits)
    assert np.array_equal(widen_bf16(bits), x.bfloat16().float().numpy())
    assert np.array_equal(
        round_to_e4m3(x.numpy()), x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    )
    assert round_to_e4m3(np.float32(1e6)) == 0x7E  # saturates at 448


@triton.jit
def arithmetic(a_ptr, b_ptr, out_ptr, total_ptr, steps, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    for _ in range(0, steps):
        a = a * b + b
    tl.store(out_ptr + place, tl.where(a > b, a - b, -a))
    tl.store(total_ptr, tl.sum(a.to(tl.float32), axis=0))


def test_bf16_arithmetic_rounds_after_every_operation() -> None:
    a, b = torch.randn(64).to(BF16), torch.randn(64).to(BF16)
    out, total = torch.empty(64, dtype=BF16), torch.empty(1, dtype=FP32)
    arithmetic[(1,)](a, b, out, total, 2, SIZE=64)
    for _ in range(2):
        a = a * b + b
    assert torch.equal(out, torch.where(a > b, a - b, -a))
    torch.testing.assert_close(total[0], a.float().sum())
