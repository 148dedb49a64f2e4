"""Attention between frames: the Triton face against the reference, and in a whole header."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_rig import BF16, DEVICE, DTYPES, FP32, check, randn, strided
from safetensors.torch import load_file
from torch import Tensor

from kineticlip_kernels import temporal_triton
from kineticlip_kernels.dispatch import Impl, UnsupportedInput
from kineticlip_kernels.mlp import linear_quick_gelu
from kineticlip_kernels.norm import add_layer_norm
from kineticlip_kernels.temporal import frame_attention, frame_attention_reference

GOLDEN = Path(__file__).parents[1] / "golden" / "text4vis" / "fusion_transf.safetensors"
EPS = 1e-12  # of the header's norms, as in the official code
HEADS = 2  # of the recorded header: text width 128 / 64

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
    parts = qkv.transpose(1, 3).unbind(2)
    fused = F.scaled_dot_product_attention(*parts).transpose(1, 2)
    assert torch.allclose(frame_attention_reference(qkv), fused, atol=1e-12)


def header(weights: Mapping[str, Tensor], frames: Tensor, heads: int, impl: Impl) -> Tensor:
    """Text4Vis' temporal transformer on the fused ops: frame embeddings [B, T, E] -> [B, E]."""
    x = frames + weights["frame_position_embeddings.weight"][: frames.shape[1]]
    update = torch.zeros_like(x)
    layers = {key.split(".")[2] for key in weights if key.startswith("transformer.resblocks.")}
    for layer in sorted(layers, key=int):
        of = partial("transformer.resblocks.{}.{}".format, layer)
        pairs = {
            name: (weights[of(f"{name}.weight")], weights[of(f"{name}.bias")])
            for name in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        }
        x, y = add_layer_norm(x, update, *pairs["ln_1"], EPS, impl=impl)
        packed = weights[of("attn.in_proj_weight")], weights[of("attn.in_proj_bias")]
        qkv = F.linear(y, *packed).unflatten(-1, (3, heads, -1))  # [B, T, 3, H, K]
        mixed = frame_attention(qkv, impl=impl).flatten(2)
        update = F.linear(mixed, *pairs["attn.out_proj"])
        x, y = add_layer_norm(x, update, *pairs["ln_2"], EPS, impl=impl)
        update = F.linear(linear_quick_gelu(y, *pairs["mlp.c_fc"], impl=impl), *pairs["mlp.c_proj"])
    return (x + update + frames).mean(dim=1)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_header_of_six_layers_is_the_official_one(impl: Impl) -> None:
    stored = {key: value.float().to(DEVICE) for key, value in load_file(GOLDEN).items()}
    weights = {key.removeprefix("fusion_model."): value for key, value in stored.items()}
    case = load_file(GOLDEN.with_name("case_fusion_only.safetensors"))
    found = header(weights, case["x"].float().to(DEVICE), HEADS, impl)
    expected = case["y_Transf"].float().to(DEVICE)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_operator_under_torch_compile() -> None:
    qkv = randn(2, 4, 3, 1, 8)
    compiled = torch.compile(face, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(qkv).square().sum(), qkv)
    (expected,) = torch.autograd.grad(face(qkv).square().sum(), qkv)
    assert torch.allclose(found, expected, atol=1e-6)
    torch.library.opcheck(temporal_triton._frame_attention.operator, (qkv,))


def test_what_cannot_run_says_why() -> None:
    with pytest.raises(UnsupportedInput, match=r"qkv is \(2, 4, 2, 1, 8\)"):
        frame_attention(randn(2, 4, 2, 1, 8))
    with pytest.raises(UnsupportedInput, match="qkv is fp64"):
        face(randn(2, 4, 3, 1, 8, dtype=torch.float64))
    assert frame_attention(randn(1, 200, 3, 1, 8, dtype=FP32)).shape == (1, 200, 1, 8)
