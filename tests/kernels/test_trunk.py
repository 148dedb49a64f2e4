"""A vision transformer, an 8-bit one and a temporal header on the kernels equal the plain ones.

Kernel tests alone do not show that the ops fit together: strides, the residual stream that
travels in two parts, gradients that meet in one parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_rig import DEVICE, FP32, MATRIX, check, randn
from torch import Tensor
from torch.func import functional_call

from kineticlip.models.architectures import VisionShape
from kineticlip.models.fp8 import quantize_tower
from kineticlip.models.temporal import TemporalTransformer
from kineticlip.models.transformer import Block
from kineticlip.models.vision import VisionTransformer
from kineticlip_kernels.dispatch import recorded_choices

SHAPE = VisionShape(
    resolution=24, patch=8, width=32, layers=2, heads=2, embed=16, mlp_width=48
)  # 10 tokens


def tower(kernels: Any, dtype: torch.dtype = MATRIX) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(SHAPE, kernels=kernels, attention=kernels)
    for parameter in model.parameters():  # biases and LayerNorms start trivial
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(DEVICE, dtype)


def embed(kernels: Any, sourced: bool) -> Callable[..., Tensor]:
    model = tower(kernels)

    def run(pixels: Tensor, parameters: dict[str, Tensor], prompts: Tensor) -> Tensor:
        def sources(block: int, x: Tensor) -> list[Tensor]:
            summary = x[:, :1].unflatten(0, (2, 2)).mean(dim=1)  # [2, 1, D], one a clip
            return [prompts[block : block + 1], summary]

        keywords = {"sources": sources if sourced else None}
        return functional_call(model, parameters, (pixels,), keywords)

    return run


@pytest.mark.parametrize("sourced", [False, True])
def test_embeddings_and_every_gradient(sourced: bool) -> None:
    parameters = {
        name: value.detach().clone().requires_grad_()
        for name, value in tower("reference").named_parameters()
    }
    check(
        embed("reference", sourced),
        embed("triton", sourced),
        pixels=randn(4, 3, 24, 24, dtype=MATRIX),
        parameters=parameters,
        prompts=randn(2, 3, 32, dtype=MATRIX, seed=1, grad=sourced),
    )


def test_auto_is_the_reference_on_a_cpu() -> None:
    pixels = randn(2, 3, 24, 24, dtype=MATRIX, grad=False)
    with torch.no_grad():
        plain, chosen = tower("reference")(pixels), tower("auto")(pixels)
    tolerance = 1e-5 if MATRIX == FP32 else 3e-2
    torch.testing.assert_close(chosen, plain, rtol=tolerance, atol=tolerance)


def test_embeddings_in_8_bits() -> None:
    """Every operand is rounded to 4 bits: where two sums differ in the last place, one of them
    may be rounded to the next of 8 steps. So the faces agree 20 times better than 8 bits with 32,
    not to the last place. Between the products everything is fp32: 16 bits, which a GPU's kernels
    need, round in other places on each face, and move many operands to another step."""
    pixels = randn(4, 3, 24, 24, dtype=MATRIX, grad=False)
    found = {}
    with torch.no_grad():
        plain = tower("reference")(pixels)
        for impl in ("reference", "triton"):
            model = tower(impl).requires_grad_(False)
            assert quantize_tower(model, kernels=impl) == 4 * SHAPE.layers
            with recorded_choices() as choices:
                found[impl] = model(pixels)
            assert {c.face for c in choices if c.op.endswith("fp8")} == {impl}
    rounding = (found["reference"] - plain).abs().max()
    assert rounding > 0
    share = 20 if MATRIX == FP32 else 1
    assert (found["triton"] - found["reference"]).abs().max() <= rounding / share


def header(impl: Any) -> TemporalTransformer:
    torch.manual_seed(0)
    return TemporalTransformer(32, 2, layers=2, kernels=impl, attention=impl).to(DEVICE, MATRIX)


def test_temporal_header_and_every_gradient() -> None:
    def of(impl: Any) -> Callable[..., Tensor]:
        model = header(impl)
        return lambda frames, parameters: functional_call(model, parameters, (frames,))

    parameters = {
        name: (value.detach() + 0.1).requires_grad_()
        for name, value in header("reference").named_parameters()
    }
    frames = randn(2, 5, 32, dtype=MATRIX)
    check(of("reference"), of("triton"), frames=frames, parameters=parameters)
    with recorded_choices() as choices:
        header("triton")(frames)
    assert {c.face for c in choices if c.op == "frame_attention"} == {"triton"}


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_temporal_header_on_other_attention(attention: Any) -> None:
    frames = randn(2, 5, 32, dtype=MATRIX, grad=False)
    model = header("reference")
    with torch.no_grad():
        plain = model(frames)
        for block in model.transformer.resblocks:
            assert isinstance(block, Block)
            block.attn.impl = attention
        tolerance = 1e-5 if MATRIX == FP32 else 3e-2
        torch.testing.assert_close(model(frames), plain, rtol=tolerance, atol=tolerance)
