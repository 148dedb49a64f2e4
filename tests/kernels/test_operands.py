"""What the ops refuse before any face runs: no kernel reads past an end or guesses a meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_rig import BF16, DEVICE, FP32, MATRIX, randn
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.attention import attention, class_attention
from kineticlip_kernels.dispatch import UnsupportedInput, interpreter_repaired, triton_reasons
from kineticlip_kernels.evl import attend_tokens, displacement, neighbour_maps
from kineticlip_kernels.examples import examples
from kineticlip_kernels.fp8 import linear_fp8, quantize_rows
from kineticlip_kernels.head import class_cross_entropy, mean_normalize, top_classes
from kineticlip_kernels.launch import near
from kineticlip_kernels.mlp import linear_quick_gelu
from kineticlip_kernels.norm import layer_norm
from kineticlip_kernels.patches import cut_crops, fold_patch_embedding, unfold_patches
from kineticlip_kernels.temporal import frame_attention

EXAMPLES = examples(torch.device(DEVICE), FP32)
X, ROWS = randn(4, 24), randn(24, seed=1)
QKV, KEY = randn(2, 3, 3, 1, 8), randn(1, 2, 1, 8)
MAPS = randn(2, 1, 2, 16, 16)
FRAMES = torch.zeros(1, 8, 8, 3, dtype=torch.uint8, device=DEVICE)
LABELS = torch.zeros(4, dtype=torch.int64, device=DEVICE)


def crops(*given: Any) -> Callable[[], Tensor]:
    return lambda: cut_crops(FRAMES, given, width=8, height=8, side=4)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "weights of two widths": (
        lambda: displacement(MAPS, randn(49, 8), randn(49, 5), grid=(4, 4)),
        "next_weight (49, 5) fp32; expected two [49, C] of one dtype",
    ),
    "a crop of two": (crops((0, 0)), "crop 0 is (0, 0), expected (x, y, mirrored)"),
    "a box": (crops((0, 0, False), (0, 0, 4, 4)), "crop 1 is (0, 0, 4, 4), expected"),
    "parts of pixels": (crops((0.5, 0, False)), "crop 0 is (0.5, 0, False), expected"),
    "one crop, not a list": (crops(*(0, 0, False)), "crop 0 is 0, expected"),
    "patches that are not square": (
        lambda: fold_patch_embedding(randn(4, 3, 16, 8), [0.5] * 3, [0.5] * 3),
        "conv_weight is (4, 3, 16, 8), expected [D, 3, P, P]",
    ),
    "two means": (
        lambda: fold_patch_embedding(randn(4, 3, 8, 8), [0.5] * 2, [0.5] * 3),
        "2 means and 3 stds, expected three each",
    ),
    "bytes minus 128 in bytes": (
        lambda: unfold_patches(FRAMES.permute(0, 3, 1, 2), 4, dtype=torch.uint8),
        "dtype is uint8, expected a float",
    ),
    "a patch that is no number": (
        lambda: unfold_patches(FRAMES.permute(0, 3, 1, 2), (4, 4)),  # type: ignore[arg-type]
        "patch is (4, 4), expected a side in pixels of 1 to 8",
    ),
    "integers to average": (
        lambda: mean_normalize(torch.ones(2, 3, 4, dtype=torch.uint8, device=DEVICE)),
        "x is uint8, expected a floating dtype",
    ),
    "integers to attend": (
        lambda: neighbour_maps(*[torch.ones(1, 2, 3, 1, 8, dtype=torch.int32)] * 2),
        "q is int32, expected a floating dtype",
    ),
    "two devices": (
        lambda: class_cross_entropy(X, randn(7, 24, seed=2).to("meta"), LABELS, 1.0),
        f"x is on {X.device}, classes is on meta; expected one device",
    ),
    "labels elsewhere": (
        lambda: class_cross_entropy(X, randn(7, 24, seed=2), LABELS.to("meta"), 1.0),
        "labels is on meta",
    ),
    "values elsewhere": (
        lambda: attention(QKV, sources=[(KEY, KEY.to("meta"))]),
        "v of source 0 is on meta",
    ),
    "a source of three": (
        lambda: attention(QKV, sources=[(KEY, KEY, KEY)]),  # type: ignore[list-item]
        "source 0 is no pair (k, v) of tensors",
    ),
    "a source without rows": (
        lambda: attention(QKV, sources=[(torch.ones((), device=DEVICE),) * 2]),
        "source 0 is k () fp32, v () fp32; expected two [M', n, 1, 8] of fp32",
    ),
    "a class source of another dtype": (
        lambda: class_attention(
            randn(2, 3, 8), randn(24, 8), randn(24), heads=1, sources=[randn(1, 2, 8, dtype=BF16)]
        ),
        "source 0 is bf16, x fp32; expected one dtype",
    ),
    "no class token": (
        lambda: class_attention(randn(2, 0, 8), randn(24, 8), randn(24), heads=1),
        "x is (2, 0, 8), weight (24, 8) and bias (24,); expected [M, N >= 1, D]",
    ),
    "two dtypes in a product": (
        lambda: linear_quick_gelu(X.to(BF16), randn(8, 24), randn(8)),
        "x, weight and bias are bf16, fp32, fp32; expected one dtype",
    ),
    "a number for a tensor": (
        lambda: layer_norm(X, ROWS, 0.0),  # type: ignore[arg-type]
        "bias is a float, not a tensor",
    ),
    "a tensor for 8 bits": (
        lambda: linear_fp8(X, quantize_rows(X.detach())),  # type: ignore[arg-type]
        "x is a Tensor, expected a Scaled, which quantize_rows makes",
    ),
    "a scale for each row": (
        lambda: class_cross_entropy(X, randn(7, 24, seed=2), LABELS, torch.ones(4, device=DEVICE)),
        "scale is fp32 (4,), expected one number",
    ),
    "tokens without frames": (
        lambda: attend_tokens(randn(1, 2, 8), randn(1, 3, 8)),
        "tokens are (1, 3, 8), expected [B, T, N, C]",
    ),
    "frames unpacked": (
        lambda: frame_attention(randn(1, 3, 8)),
        "qkv is (1, 3, 8), expected [B, T, 3, H, K]",
    ),
    "rows of another width": (
        lambda: top_classes(X, randn(7, 8), 1),
        "expected [N, E] or [N, V, E] and [C, E]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(UnsupportedInput) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_unknown_face_is_told_every_known_one(name: str) -> None:
    """Those that its own annotation has."""
    op = EXAMPLES[name].op
    with pytest.raises(UnsupportedInput) as caught:
        op(**EXAMPLES[name].inputs, impl="cuda")
    known = str(caught.value).partition("known: ")[2].split(", ")
    assert known[:2] == ["auto", "reference"]
    for face in known[1:]:
        try:
            op(**EXAMPLES[name].inputs, impl=face)
        except UnsupportedInput as error:
            assert "cannot run: " in str(error)


def test_chunked_attention_refuses_to_lose_gradients() -> None:
    with pytest.raises(UnsupportedInput, match="gradients are wanted, and it keeps nothing"):
        attention(QKV, impl="chunked")
    with torch.autocast(DEVICE, dtype=BF16), pytest.raises(UnsupportedInput, match="autocast"):
        attention(QKV.detach(), impl="chunked")
    plain = attention(QKV.detach(), impl="chunked")
    torch.testing.assert_close(plain, attention(QKV.detach(), impl="reference"))


def test_a_source_that_wants_a_gradient_gets_one() -> None:
    """In bf16 on a CPU, where the fastest face keeps nothing for a backward pass."""
    key = KEY.detach().to(BF16).requires_grad_()
    out = attention(QKV.detach().to(BF16), sources=[(key, key)])
    (grad,) = torch.autograd.grad(out.sum(), key)
    assert grad.abs().sum() > 0


def test_parameters_of_two_dtypes_normalise_on_the_reference() -> None:
    x = X.detach().to(BF16)
    expected = layer_norm(x, ROWS, ROWS, impl="reference")
    for weight, bias in [(ROWS, ROWS.to(BF16)), (ROWS.to(BF16), ROWS)]:
        found = layer_norm(x, weight, bias, impl="reference")
        assert found.dtype == BF16
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["class_cross_entropy", "neighbour_maps", "attend_tokens"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_autocast_does_not_round_what_is_promised_in_fp32(name: str, impl: str) -> None:
    example = EXAMPLES[name]
    expected = example.op(**example.inputs, impl=impl)
    with torch.autocast(DEVICE, dtype=BF16):
        found = example.op(**example.inputs, impl=impl)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_autocast_does_not_round_probabilities() -> None:
    x, classes = torch.nn.functional.normalize(randn(8, 24, grad=False)), randn(50, 24, grad=False)
    expected, _ = top_classes(x, classes, 5, impl="reference")
    with torch.autocast(DEVICE, dtype=BF16):
        found, _ = top_classes(x, classes, 5, impl="reference")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_scale_may_be_a_number() -> None:
    classes = randn(7, 24, seed=2)
    expected = class_cross_entropy(X, classes, LABELS, torch.tensor(3.0, device=DEVICE))
    assert torch.equal(class_cross_entropy(X, classes, LABELS, 3.0), expected)
    boxed = torch.full((1, 1, 1), 3.0, device=DEVICE)
    assert torch.equal(class_cross_entropy(X, classes, LABELS, boxed), expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted on a GPU")
def test_the_stock_interpreter_is_not_given_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    x = X.to(BF16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert interpreter_repaired() and triton_reasons("triton", x=x) == []

    def cast_impl(*arguments: Any) -> None:
        raise AssertionError("never called")

    cast_impl.__module__ = "triton.runtime.interpreter"
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    assert triton_reasons("triton", x=x) == [
        "x is bf16, which Triton's interpreter gets wrong unless repaired"
    ]
    assert triton_reasons("triton", x=X) == []


@pytest.mark.parametrize(
    ("shape", "strides", "fits"),
    [
        ((4, 577, 3, 16, 64), (1772544, 3072, 1024, 64, 1), True),
        ((600000, 4096), (4096, 1), True),  # axis 0 is counted in 64 bits
        ((130, 2160, 3840, 3), (8294400, 3840, 1, 130 * 8294400), False),  # planes of 4K frames
        ((32, 577, 1024), (1024, 4096 * 1024, 1), False),  # tokens first, 4096 images
        ((0, 5), (5, 1), True),
        ((5, 0), (1, 1), True),
    ],
)
def test_offsets_that_kernels_cannot_count(
    shape: tuple[int, ...], strides: tuple[int, ...], fits: bool
) -> None:
    assert near(torch.empty_strided(shape, strides, device="meta")) is fits


FAR = {
    "unfold_patches": ["pixels"],
    "cut_crops": ["frames"],
    "frame_attention": ["qkv"],
    "class_attention": ["x"],
    "mean_normalize": ["x"],
    "mean_softmax": ["logits"],
    "neighbour_maps": ["q", "k"],
    "attend_tokens": ["tokens"],
}


@pytest.mark.parametrize("name", FAR)
def test_far_elements_are_brought_near(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Axis 1 outermost in memory, as of planes; the limit lowered instead of the memory raised."""
    example = examples(torch.device(DEVICE), MATRIX)[name]
    inputs = dict(example.inputs)
    expected = example.op(**inputs, impl="triton")
    for argument in FAR[name]:
        inputs[argument] = inputs[argument].transpose(0, 1).contiguous().transpose(0, 1)
    copied: list[torch.Size] = []
    monkeypatch.setattr(launch, "NEAR", 1)
    contiguous = Tensor.contiguous

    def copying(x: Tensor, **options: Any) -> Tensor:
        copied.append(x.shape)
        return contiguous(x)

    monkeypatch.setattr(Tensor, "contiguous", copying)
    found = example.op(**inputs, impl="triton")
    assert all(inputs[argument].shape in copied for argument in FAR[name])
    assert torch.equal(found, expected)
