"""Attention with extra sources of keys and values: every face against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from kernel_rig import BF16, FP16, FP32, MATRIX, MATRIX_DTYPES, check, on_gpu, randn
from torch import Tensor

from kineticlip_kernels.attention import (
    attention,
    attention_chunked,
    attention_reference,
    attention_sdpa,
    choose_attention,
)
from kineticlip_kernels.dispatch import UnsupportedInput

triton_face = partial(attention, impl="triton")
# One source for all four images, one for each half, one for every image.
THREE = ((1, 3), (2, 20), (4, 5))


def operands(
    images: int,
    tokens: int,
    heads: int,
    width: int,
    sources: Sequence[tuple[int, int]] = (),
    dtype: torch.dtype = MATRIX,
) -> dict[str, Any]:
    pairs = [
        tuple(randn(rows, n, heads, width, dtype=dtype, seed=2 * i + part) for part in (1, 2))
        for i, (rows, n) in enumerate(sources)
    ]
    return {"qkv": randn(images, tokens, 3, heads, width, dtype=dtype), "sources": pairs}


# 17 and 33 tokens: one over a tile of 16, which 50 is not near and 1 is far under.
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize(
    ("images", "tokens", "heads", "width", "sources"),
    [
        (2, 17, 2, 16, ()),
        (1, 50, 1, 24, ()),
        (4, 17, 1, 8, THREE),
        (2, 1, 1, 16, ((1, 1),)),
        (0, 7, 2, 8, ()),
        (0, 7, 2, 8, ((1, 3), (2, 2))),
        *on_gpu((4, 577, 16, 64, ((1, 8), (2, 24))), (2, 257, 4, 80, ()), (2, 50, 2, 128, ())),
    ],
)
def test_triton(
    images: int,
    tokens: int,
    heads: int,
    width: int,
    sources: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> None:
    check(
        attention_reference, triton_face, **operands(images, tokens, heads, width, sources, dtype)
    )


def test_triton_on_the_tokens_of_a_whole_image() -> None:
    """ViT-L/14 at 224 pixels; the interpreter takes five times as long at 336."""
    check(attention_reference, triton_face, **operands(1, 257, 1, 8, (), BF16))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("sources", [(), THREE])
def test_plain_faces(sources: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
    inputs = operands(4, 33, 2, 8, sources, dtype)
    check(attention_reference, attention_sdpa, **inputs)
    with torch.no_grad():
        frozen = {
            "qkv": inputs["qkv"].detach(),
            "sources": [(k.detach(), v.detach()) for k, v in inputs["sources"]],
        }
        check(attention_reference, attention_chunked, **frozen)


def test_chunks_of_heads_cover_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kineticlip_kernels.attention.torch_faces.CHUNK", 2 * 9 * 9
    )  # two heads a chunk
    qkv = randn(1, 9, 3, 5, 8, grad=False)
    check(attention_reference, attention_chunked, qkv=qkv)


def test_sources_are_more_keys_and_values() -> None:
    """With a softmax over everything, order and grouping of the keys make no difference."""
    inputs = operands(2, 6, 2, 8, ((1, 3), (2, 4)), torch.float64)
    qkv, ((k0, v0), (k1, v1)) = inputs["qkv"], inputs["sources"]
    k = torch.cat([k1, qkv[:, :, 1], k0.expand(2, -1, -1, -1)], dim=1)
    v = torch.cat([v1, qkv[:, :, 2], v0.expand(2, -1, -1, -1)], dim=1)
    scores = torch.einsum("mnhk,mshk->mhns", qkv[:, :, 0], k) / 8**0.5
    expected = torch.einsum("mhns,mshk->mnhk", scores.softmax(-1), v)
    torch.testing.assert_close(attention_reference(**inputs), expected)


def test_image_m_reads_source_row_m_over_share() -> None:
    inputs = operands(4, 5, 1, 8, ((2, 3),), torch.float64)
    (k, v) = inputs["sources"][0]
    each = [
        attention_reference(inputs["qkv"][m : m + 1], sources=[(k[m // 2, None], v[m // 2, None])])
        for m in range(4)
    ]
    torch.testing.assert_close(attention_reference(**inputs), torch.cat(each))


def test_packed_and_strided_operands_give_the_same_numbers() -> None:
    inputs = operands(2, 17, 2, 16, ((2, 5),))
    (k, v) = inputs["sources"][0]
    packed = torch.stack([k, v], dim=2).detach()  # [M', n, 2, H, K], as one projection writes them
    with torch.no_grad():
        of_views = triton_face(
            strided_tokens(inputs["qkv"]), sources=[(packed[:, :, 0], packed[:, :, 1])]
        )
        assert torch.equal(of_views, triton_face(inputs["qkv"], sources=[(k, v)]))


def strided_tokens(qkv: Tensor) -> Tensor:
    return qkv.detach().transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("wanted", ["qkv", "k", "v"])
def test_gradients_that_nobody_wants(wanted: str) -> None:
    inputs = operands(4, 9, 1, 8, ((1, 3),), FP16)
    (k, v) = inputs["sources"][0]
    for name, tensor in {"qkv": inputs["qkv"], "k": k, "v": v}.items():
        tensor.requires_grad_(name == wanted)
    check(attention_reference, triton_face, **inputs)


def test_large_scores_do_not_overflow() -> None:
    inputs = {"qkv": randn(1, 20, 3, 1, 8, scale=30.0, dtype=FP16)}
    check(attention_reference, triton_face, **inputs)


def test_reference_passes_gradcheck() -> None:
    inputs = operands(2, 3, 2, 4, ((1, 2), (2, 1)), torch.float64)
    (k0, v0), (k1, v1) = inputs["sources"]

    def function(qkv: Tensor, k0: Tensor, v0: Tensor, k1: Tensor, v1: Tensor) -> Tensor:
        return attention_reference(qkv, sources=[(k0, v0), (k1, v1)])

    assert torch.autograd.gradcheck(function, (inputs["qkv"], k0, v0, k1, v1))


@pytest.mark.parametrize(
    ("shape", "sources", "message"),
    [
        ((2, 3, 2, 2, 4), (), "expected [M, N, 3, H, K]"),
        ((2, 3, 3, 2, 4), ((2, 1, 2, 8),), "source 0 is k (2, 1, 2, 8)"),
        ((3, 3, 3, 2, 4), ((2, 1, 2, 4),), "source 0 has 2 rows, which do not divide 3 images"),
    ],
)
def test_malformed_operands_are_named(
    shape: tuple[int, ...], sources: Sequence[tuple[int, ...]], message: str
) -> None:
    pairs = [(torch.zeros(source), torch.zeros(source)) for source in sources]
    with pytest.raises(UnsupportedInput) as caught:
        attention(torch.zeros(shape), sources=pairs)
    assert message in str(caught.value)


@pytest.mark.parametrize("impl", ["auto", "reference", "sdpa", "triton"])
@pytest.mark.parametrize("wrong", ["k", "v"])
def test_sources_of_another_dtype_are_refused(wrong: str, impl: Any) -> None:
    inputs = operands(2, 5, 1, 8, ((1, 3),), FP16)
    pair = dict(zip("kv", inputs["sources"][0], strict=True))
    pair[wrong] = pair[wrong].to(BF16)
    with pytest.raises(UnsupportedInput, match=r"source 0 is k .* of fp16"):
        attention(inputs["qkv"], sources=[tuple(pair.values())], impl=impl)


def test_choice_of_the_face_on_a_cpu() -> None:
    qkv = torch.zeros(1, 2, 3, 1, 8)
    assert choose_attention(qkv, (), "auto") == "sdpa"
    assert choose_attention(qkv.bfloat16(), (), "auto") == "chunked"
    assert choose_attention(qkv.bfloat16().requires_grad_(), (), "auto") == "sdpa"
    with pytest.raises(UnsupportedInput, match=r"xformers.*qkv is on cpu"):
        attention(qkv, impl="xformers")
    with pytest.raises(UnsupportedInput, match="5 sources"):
        attention(qkv, sources=[(qkv[:, :, 0], qkv[:, :, 1])] * 5, impl="triton")
    unknown: Any = "flash"
    with pytest.raises(UnsupportedInput, match="unknown impl 'flash'"):
        attention(qkv, impl=unknown)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of rows that are never stored
@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize(
    ("depth", "upper"), [(20.0, 1.0), (100.0, 1.0), (8.0, 256.0), (20.0, 16384.0)]
)
def test_keys_behind_the_end_stay_out_of_gradients(
    depth: float, upper: float, dtype: torch.dtype
) -> None:
    """Every real score far below zero, where the scores of a tile's padding are."""
    qkv = randn(2, 5, 3, 1, 16, scale=0.1, grad=False)
    qkv[:, :, 0, :, 0] = depth**0.5
    qkv[:, :, 1, :, 0] = -4 * depth**0.5  # scores: -depth, and a little
    grads = {}
    for impl in ("reference", "triton"):
        x = qkv.to(dtype).requires_grad_()
        (grads[impl],) = torch.autograd.grad(attention(x, impl=impl).sum() * upper, x)
    assert grads["triton"].isfinite().all()
    torch.testing.assert_close(grads["triton"], grads["reference"], rtol=0.02, atol=0.02 * upper)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what is asked for
def test_gradients_of_what_is_not_a_number_are_not_either() -> None:
    qkv = randn(1, 5, 3, 1, 16, grad=False)
    qkv[0, 2, 0, 0, 3] = float("nan")
    for impl in ("reference", "triton"):
        x = qkv.to(MATRIX).requires_grad_()
        (grad,) = torch.autograd.grad(attention(x, impl=impl).sum(), x)
        assert grad[:, 2, 0].isnan().all() and grad[:, :, 1].isnan().all()
