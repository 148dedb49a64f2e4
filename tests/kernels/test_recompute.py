"""Outputs made again in the backward pass: the same gradients to the bit, and less memory kept."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_rig import BF16, randn
from torch import Tensor

from kineticlip.models.architectures import VisionShape
from kineticlip.models.vision import VisionTransformer
from kineticlip_kernels import mlp, norm
from kineticlip_kernels.mlp import linear_quick_gelu
from kineticlip_kernels.norm import add_layer_norm, layer_norm
from kineticlip_kernels.recompute import recomputed

Leaves = list[Tensor]


def leaves() -> Leaves:
    shapes = [(2, 5, 16), (16,), (16,), (24, 16), (24,), (16, 24)]
    return [randn(*shape, dtype=BF16, seed=seed) for seed, shape in enumerate(shapes)]


def block(values: Leaves, impl: Any) -> tuple[Tensor, list[weakref.ref[Tensor]]]:
    """Half a ViT block, and what it need not keep."""
    x, weight, bias, wide, wide_bias, narrow = values
    y0 = layer_norm(x, weight, bias, impl=impl)
    update = F.linear(y0, narrow.t()[:16])
    total, y1 = add_layer_norm(x, update, weight, bias, impl=impl)
    hidden = linear_quick_gelu(y1, wide, wide_bias, impl=impl)
    return total + F.linear(hidden, narrow), [weakref.ref(t) for t in (y0, y1, hidden)]


def gradients(impl: str, context: Any) -> tuple[list[Tensor], list[bool]]:
    values = leaves()
    with context:
        out, outputs = block(values, impl)
    gc.collect()
    kept = [reference() is not None for reference in outputs]
    return list(torch.autograd.grad(out, values, torch.ones_like(out))), kept


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_same_gradients_from_less(impl: str) -> None:
    expected, kept = gradients(impl, nullcontext())
    assert kept == [True, True, True]
    found, kept = gradients(impl, recomputed())
    assert kept == [False, False, False]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_an_output_changed_in_place_is_kept_as_it_is() -> None:
    x, weight, bias, wide, *_ = leaves()
    with recomputed():
        y = layer_norm(x, weight, bias).mul_(2)
        out = F.linear(y, wide)
    (found,) = torch.autograd.grad(out.sum(), [wide])
    y = 2 * norm.layer_norm_reference(x, weight, bias)
    torch.testing.assert_close(found, y.detach().sum(dim=(0, 1)).expand(24, 16))


def test_part_of_an_output_is_kept_as_it_is() -> None:
    x, weight, bias, wide, *_ = leaves()
    with recomputed():
        y = layer_norm(x, weight, bias)
        out = F.linear(y[:, 0], wide)
    (found,) = torch.autograd.grad(out.sum(), [wide])
    torch.testing.assert_close(found, y[:, 0].detach().sum(dim=0).expand(24, 16))


def test_nothing_is_recorded_outside() -> None:
    x = randn(3, 4)
    y = mlp.quick_gelu(x)
    with recomputed():
        out = (y * y).sum()
    (found,) = torch.autograd.grad(out, [x])
    (expected,) = torch.autograd.grad(mlp.quick_gelu(x).square().sum(), [x])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_tower_trains_to_the_same_bits(checkpointing: bool) -> None:
    shape = VisionShape(resolution=16, patch=8, width=32, layers=2, heads=2, embed=8, mlp_width=64)
    torch.manual_seed(0)
    tower = VisionTransformer(shape)
    tower.transformer.checkpointing = checkpointing
    pixels = torch.randn(3, 3, 16, 16)
    results = []
    for context in (nullcontext(), recomputed()):
        with context:
            loss = tower(pixels).square().sum()
        results.append(torch.autograd.grad(loss, list(tower.parameters())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
