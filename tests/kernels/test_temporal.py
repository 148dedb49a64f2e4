"""Attention between frames: the Triton face against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_rig import BF16, DTYPES, FP32, check, on_gpu, randn, strided

from kineticlip_kernels.dispatch import UnsupportedInput
from kineticlip_kernels.temporal import frame_attention, frame_attention_reference, frames_triton

face = partial(frame_attention, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 8, 3, 2, 16),  # clips and heads
        (1, 17, 3, 1, 20),  # just over a block each way
        (1, 32, 3, 1, 64),  # whole blocks
        (3, 1, 3, 1, 8),  # one frame
        (0, 4, 3, 2, 8),
        *on_gpu((8, 32, 3, 12, 64)),
    ],
)
def test_frame_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(frame_attention_reference, face, qkv=randn(*shape, dtype=dtype))


def test_longest_sequences() -> None:
    check(frame_attention_reference, face, qkv=randn(1, 77, 3, 1, 64, dtype=BF16))
    with pytest.raises(UnsupportedInput, match=r"77 frames of 64 channels in fp32 \(at most 32"):
        face(randn(1, 77, 3, 1, 64))


def test_strided_and_far_inputs() -> None:
    check(frame_attention_reference, face, qkv=strided(randn(1, 5, 3, 2, 8)))
    swapped = randn(6, 2, 3, 1, 8).detach().transpose(0, 1).requires_grad_()  # [B, T, ...]
    check(frame_attention_reference, face, qkv=swapped)
    check(frame_attention_reference, face, qkv=randn(1, 6, 3, 1, 16, scale=4.0))


def test_reference_passes_gradcheck_and_equals_sdpa() -> None:
    qkv = randn(2, 5, 3, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(frame_attention_reference, qkv)
    q, k, v = qkv.transpose(1, 3).unbind(2)
    fused = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert torch.allclose(frame_attention_reference(qkv), fused, atol=1e-12)


def test_operator_under_torch_compile() -> None:
    qkv = randn(2, 4, 3, 1, 8)
    compiled = torch.compile(face, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(qkv).square().sum(), qkv)
    (expected,) = torch.autograd.grad(face(qkv).square().sum(), qkv)
    assert torch.allclose(found, expected, atol=1e-6)
    torch.library.opcheck(frames_triton._frame_attention.operator, (qkv,))


def test_what_cannot_run_says_why() -> None:
    with pytest.raises(UnsupportedInput, match=r"qkv is \(2, 4, 2, 1, 8\)"):
        frame_attention(randn(2, 4, 2, 1, 8))
    with pytest.raises(UnsupportedInput, match="qkv is fp64"):
        face(randn(2, 4, 3, 1, 8, dtype=torch.float64))
    assert frame_attention(randn(1, 200, 3, 1, 8, dtype=FP32)).shape == (1, 200, 1, 8)
