"""8-bit operands: the producers and the GEMM against the exact op, and against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from kernel_rig import BF16, DEVICE, DTYPES, FP32, randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kineticlip_kernels.attention import attention_reference
from kineticlip_kernels.dispatch import UnsupportedInput, recorded_choices
from kineticlip_kernels.fp8 import (
    FP8,
    FP8_MAX,
    MAX_ROW,
    Scaled,
    add_layer_norm_fp8,
    attention_fp8,
    bias_quick_gelu_fp8,
    layer_norm_fp8,
    linear_fp8,
    linear_fp8_reference,
    linear_triton,
    quantize_rows,
    quantize_rows_reference,
    value_scale,
)
from kineticlip_kernels.mlp import bias_quick_gelu_reference
from kineticlip_kernels.norm import layer_norm_reference
from kineticlip_kernels.tolerance import compare

frozen = partial(randn, grad=False)


def producers(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], Tensor, list[Tensor]]]:
    """name -> (op of the arguments and an impl, the exact result in float64, the arguments)."""
    x, weight, bias = frozen(7, 50, dtype=dtype), frozen(50, seed=1), frozen(50, seed=2)
    qkv = frozen(2, 17, 3, 2, 16, dtype=dtype)
    pair = [frozen(1, 3, 2, 16, dtype=dtype, seed=seed) for seed in (3, 4)]
    wide, k, v = (tensor.double() for tensor in (qkv, *pair))

    def attend(qkv: Tensor, k: Tensor, v: Tensor, impl: Any) -> Scaled:
        return attention_fp8(qkv, sources=[(k, v)], impl=impl)

    normed = layer_norm_reference(x.double(), weight.double(), bias.double())
    return {
        "quantize_rows": (quantize_rows, x.double(), [x]),
        "layer_norm_fp8": (layer_norm_fp8, normed, [x, weight, bias]),
        "bias_quick_gelu_fp8": (
            bias_quick_gelu_fp8,
            bias_quick_gelu_reference(x.double(), bias.to(dtype).double()),
            [x, bias.to(dtype)],
        ),
        "attention_fp8": (
            attend,
            attention_reference(wide, sources=[(k, v)]).flatten(2),
            [qkv, *pair],
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", producers(FP32))
def test_producers(name: str, dtype: torch.dtype) -> None:
    if dtype == FP32 and DEVICE == "cuda" and name == "attention_fp8":
        dtype = BF16
    op, exact, arguments = producers(dtype)[name]
    found, plain = op(*arguments, impl="triton"), op(*arguments, impl="reference")
    assert found.values.dtype == FP8 and found.scale.shape == exact.shape[:-1]
    torch.testing.assert_close(found.scale, plain.scale, rtol=2e-2, atol=0)
    result = compare(name, found.dequantized(), plain.dequantized(), exact)
    assert result.passed, str(result)
    assert result.error < 0.07 * exact.abs().max()  # half of 2^-3, on the largest element


def test_add_layer_norm_keeps_the_stream_exact() -> None:
    x, update = frozen(5, 24, dtype=BF16), frozen(5, 24, dtype=BF16, seed=1)
    parameters = frozen(24, seed=2), frozen(24, seed=3)
    total, normed = add_layer_norm_fp8(x, update, *parameters, impl="triton")
    assert torch.equal(total, x + update)
    alone = layer_norm_fp8(total, *parameters, impl="triton")
    assert torch.equal(normed.values.float(), alone.values.float())
    assert torch.equal(normed.scale, alone.scale)


def test_rows_of_zeros_and_the_largest_value() -> None:
    x = torch.zeros(3, 8, device=DEVICE)
    x[1] = torch.linspace(-7, 7, 8)
    for impl in ("reference", "triton"):
        scaled = quantize_rows(x, impl=impl)
        assert torch.equal(scaled.dequantized()[0], x[0]), impl
        assert scaled.values.float().abs().max() == FP8_MAX, impl
        assert scaled.scale[0] == 1.0, impl


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    # 200 products: more than a block of the reduction, none of which fp32 may forget.
    ("rows", "depth", "width"),
    [((33,), 64, 40), ((2, 5), 48, 32), ((0,), 32, 32), ((3,), 200, 24)],
)
def test_linear(
    rows: tuple[int, ...], depth: int, width: int, biased: bool, dtype: torch.dtype
) -> None:
    x = quantize_rows_reference(frozen(*rows, depth))
    weight = quantize_rows_reference(frozen(width, depth, seed=1))
    bias = frozen(width, dtype=dtype, seed=2) if biased else None
    exact = torch.nn.functional.linear(
        x.dequantized(torch.float64),
        weight.dequantized(torch.float64),
        None if bias is None else bias.double(),
    )
    found = linear_fp8(x, weight, bias, dtype=dtype, impl="triton")
    result = compare("y", found, linear_fp8_reference(x, weight, bias, dtype=dtype), exact)
    assert result.passed, str(result)


def test_value_scale_bounds_every_output() -> None:
    qkv, k, v = frozen(4, 9, 3, 2, 8, scale=3.0), frozen(2, 3, 2, 8), frozen(2, 3, 2, 8, scale=20.0)
    out = attention_reference(qkv, sources=[(k, v)])
    scale = value_scale(qkv, [(k, v)])
    assert (out.abs().amax(dim=(1, 2, 3)) <= scale * FP8_MAX * (1 + 1e-6)).all()
    alone = value_scale(qkv)
    torch.testing.assert_close(alone, qkv[:, :, 2].abs().amax(dim=(1, 2, 3)) / FP8_MAX)
    assert (scale[:2] > alone[:2]).all()  # the wide source bounds them now


def test_gradients_are_refused() -> None:
    with pytest.raises(UnsupportedInput, match="8 bits are for inference"):
        quantize_rows(randn(2, 4))
    with torch.no_grad():
        assert quantize_rows(randn(2, 4), impl="reference").values.shape == (2, 4)


def test_scaled_mm_says_why_not() -> None:
    x, weight = quantize_rows_reference(frozen(2, 8)), quantize_rows_reference(frozen(3, 8))
    assert linear_fp8(x, weight).shape == (2, 3)
    with pytest.raises(UnsupportedInput, match="multiples of 16 only"):
        linear_fp8(x, weight, impl="scaled_mm")


@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_operands_that_do_not_fit_are_refused(impl: Any) -> None:
    x, short, bias = frozen(4, 24), frozen(8), frozen(24)
    for call in (
        lambda: layer_norm_fp8(x, short, short, impl=impl),
        lambda: add_layer_norm_fp8(x, x, bias, short, impl=impl),
        lambda: add_layer_norm_fp8(x, x[:2], bias, bias, impl=impl),
        lambda: bias_quick_gelu_fp8(x, short, impl=impl),
    ):
        with pytest.raises(UnsupportedInput, match=r"_fp8: (x|residual) is \(4, 24\)"):
            call()
    qkv, k = frozen(2, 5, 3, 1, 8), frozen(1, 3, 1, 8)
    with pytest.raises(UnsupportedInput, match="attention_fp8: source 0 is k"):
        attention_fp8(qkv, sources=[(k, k.half())], impl=impl)
    with pytest.raises(UnsupportedInput, match="attention_fp8: source 0 has 0 rows, which do not"):
        attention_fp8(qkv[:0], sources=[(k[:0], k[:0])], impl=impl)


@pytest.mark.parametrize("impl", ["auto", "reference", "triton", "scaled_mm"])
def test_factors_that_do_not_fit_are_refused(impl: Any) -> None:
    x, weight = quantize_rows_reference(frozen(4, 32)), quantize_rows_reference(frozen(16, 32))
    deep = quantize_rows_reference(frozen(16, 64))
    with pytest.raises(UnsupportedInput, match=r"x is \(4, 32\) and weight \(16, 64\)"):
        linear_fp8(x, deep, impl=impl)
    with pytest.raises(UnsupportedInput, match=r"bias is \(8,\), expected \[16\]"):
        linear_fp8(x, weight, frozen(8), impl=impl)
    with pytest.raises(UnsupportedInput, match=r"weight is \(16, 32\) fp8 with scale \(8,\)"):
        linear_fp8(x, Scaled(weight.values, weight.scale[:8]), impl=impl)
    with pytest.raises(UnsupportedInput, match=r"x is \(4, 32\) fp32 with scale \(4,\)"):
        linear_fp8(Scaled(x.values.float(), x.scale), weight, impl=impl)


def test_rows_wider_than_a_block_are_left_to_the_reference() -> None:
    x = frozen(1, MAX_ROW + 1)
    with pytest.raises(UnsupportedInput, match=f"rows of {MAX_ROW + 1} elements"):
        quantize_rows(x, impl="triton")
    assert quantize_rows(x).values.shape == x.shape


class TestOnStandInsOfGpuTensors:
    """What is chosen and called without a device: tensors claim to be on one, and are empty."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "This GPU")
        self.set_capability(monkeypatch, (9, 0))
        with FakeTensorMode():
            yield

    @staticmethod
    def set_capability(monkeypatch: pytest.MonkeyPatch, found: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)

    @staticmethod
    def tensor(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def factors(self, rows: int) -> tuple[Scaled, Scaled]:
        return tuple(  # type: ignore[return-value]
            Scaled(self.tensor(n, 32, dtype=FP8), self.tensor(n, dtype=FP32)) for n in (rows, 48)
        )

    def test_older_gpus_have_no_e4m3(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.set_capability(monkeypatch, (8, 0))
        x, row, reason = self.tensor(4, 32), self.tensor(32), "This GPU has no e4m3 arithmetic"
        calls: list[tuple[Callable[..., Any], list[Any]]] = [
            (quantize_rows, [x]),
            (layer_norm_fp8, [x, row, row]),
            (add_layer_norm_fp8, [x, x, row, row]),
            (bias_quick_gelu_fp8, [x, row]),
            (attention_fp8, [self.tensor(2, 5, 3, 1, 16)]),
            (linear_fp8, list(self.factors(4))),
        ]
        for op, arguments in calls:
            with pytest.raises(UnsupportedInput, match=f"cannot run: .*{reason}"):
                op(*arguments, impl="triton")
            with recorded_choices() as choices:
                op(*arguments)
            assert (choices[0].face, choices[0].why_not) == ("reference", (reason,)), op

    @pytest.mark.parametrize(
        ("dtype", "bias", "reason"),
        [
            (FP32, None, "the output is to be fp32 (supported: fp16, bf16)"),
            (BF16, FP32, "bias is fp32 and the output bf16"),
        ],
    )
    def test_dtypes_that_scaled_mm_refuses(
        self,
        dtype: torch.dtype,
        bias: torch.dtype | None,
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        x, weight = self.factors(4)
        row = None if bias is None else self.tensor(48, dtype=bias)
        with pytest.raises(UnsupportedInput, match="impl='scaled_mm' cannot run: ") as caught:
            linear_fp8(x, weight, row, dtype=dtype, impl="scaled_mm")
        assert reason in str(caught.value)
        launched = self.tensor(4, 48, dtype=dtype)
        monkeypatch.setattr(linear_triton, "linear_fp8_triton", lambda *given, **named: launched)
        with recorded_choices() as choices:
            assert linear_fp8(x, weight, row, dtype=dtype) is launched
        assert (choices[0].face, choices[0].why_not) == ("triton", (reason,))

    @pytest.mark.parametrize("rows", [4, 0])
    def test_scaled_mm_accumulates_in_fp32(
        self, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keywords: dict[str, Any] = {}

        def scaled_mm(x: Tensor, weight: Tensor, **given: Any) -> Tensor:
            keywords.update(given)
            return self.tensor(len(x), weight.shape[1])

        monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
        x, weight = self.factors(rows)
        with recorded_choices() as choices:
            assert linear_fp8(x, weight, self.tensor(48)).shape == (rows, 48)
        assert choices[0].face == "scaled_mm" and keywords["use_fast_accum"] is False


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize(("tokens", "more"), [(3, 0), (0, 2), (0, 0)])
def test_attention_over_no_tokens(tokens: int, more: int, impl: Any) -> None:
    qkv, source = (frozen(*shape, dtype=BF16) for shape in ((2, tokens, 3, 1, 8), (1, more, 1, 8)))
    out = attention_fp8(qkv, sources=[(source, source)], impl=impl)
    assert out.values.shape == (2, tokens, 8) and out.scale.shape == (2, tokens)
    if tokens:
        plain = attention_reference(qkv).flatten(2).float()
        step = plain.abs().max().item() / 8  # of e4m3: 2^-4 of a value, rounded either way
        torch.testing.assert_close(out.dequantized(), plain, rtol=0, atol=step)
