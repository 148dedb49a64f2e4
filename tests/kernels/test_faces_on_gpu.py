"""What "auto" takes on a GPU, tried on stand-ins of GPU tensors: no device is needed to choose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_rig import BF16, FP16, FP32
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kineticlip_kernels.attention import MAX_SOURCES, attention_reasons, choose_attention
from kineticlip_kernels.dispatch import UnsupportedInput, choose, matrix_reasons, triton_reasons
from kineticlip_kernels.temporal import frame_reasons


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors claim to be on a GPU, and nothing is interpreted."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with FakeTensorMode():
        yield


def tensor(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def source(dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    return tensor(1, 8, 16, 64, dtype=dtype), tensor(1, 8, 16, 64, dtype=dtype)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_memory_bound_kernels_take_every_precision(dtype: torch.dtype) -> None:
    assert triton_reasons("auto", x=tensor(2, 8, dtype=dtype)) == []


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_products_in_16_bits_run_on_the_kernels(dtype: torch.dtype) -> None:
    x, weight, bias = (tensor(*s, dtype=dtype) for s in ((2, 577, 1024), (4096, 1024), (4096,)))
    assert choose("op", "auto", matrix_reasons("auto", x=x, weight=weight, bias=bias)) == "triton"


def test_products_in_fp32_run_on_pytorch_and_say_why() -> None:
    x, weight = tensor(2, 8, dtype=FP32), tensor(8, 8, dtype=FP32)
    why_not = matrix_reasons("auto", x=x, weight=weight)
    assert why_not == [f"{name} is fp32, and its products need 16 bits" for name in ("x", "weight")]
    assert choose("linear_quick_gelu", "auto", why_not) == "reference"
    with pytest.raises(UnsupportedInput, match="x is fp32, and its products need 16 bits"):
        choose("linear_quick_gelu", "triton", matrix_reasons("triton", x=x, weight=weight))


@pytest.mark.parametrize(
    ("dtype", "sources", "face"),
    [
        (BF16, 0, "sdpa"),
        (BF16, 2, "triton"),
        (BF16, 5, "sdpa"),
        (FP32, 0, "sdpa"),
        (FP32, 1, "sdpa"),
    ],
)
def test_attention(dtype: torch.dtype, sources: int, face: str) -> None:
    qkv, pairs = tensor(8, 577, 3, 16, 64, dtype=dtype), [source(dtype)] * sources
    assert choose_attention(qkv, pairs, "auto") == face
    if dtype == FP32 or sources > MAX_SOURCES:
        with pytest.raises(UnsupportedInput, match=r"attention: impl='triton' cannot run: "):
            choose_attention(qkv, pairs, "triton")
    else:
        assert choose_attention(qkv, pairs, "triton") == "triton"


def test_heads_too_wide_for_attention() -> None:
    reasons: Any = attention_reasons("auto", tensor(2, 9, 3, 1, 160), [])
    assert reasons == ["heads 160 wide (at most 128)"]


@pytest.mark.parametrize(
    ("frames", "dtype", "runs"),
    [(8, BF16, True), (77, BF16, True), (32, FP32, True), (77, FP32, False), (200, BF16, False)],
)
def test_attention_between_frames(frames: int, dtype: torch.dtype, runs: bool) -> None:
    reasons = frame_reasons("auto", tensor(4, frames, 3, 12, 64, dtype=dtype))
    assert (reasons == []) == runs
    assert choose("frame_attention", "auto", reasons, slow="attention") == (
        "triton" if runs else "attention"
    )
