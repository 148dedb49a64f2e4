"""A tower on 8-bit products follows the plain one, with every way into its attention."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kineticlip.models.architectures import VisionShape
from kineticlip.models.fp8 import EightBitBlock, quantize_tower
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.errors import UserError

SHAPE = VisionShape(resolution=32, patch=8, width=64, layers=3, heads=2, embed=32, mlp_width=256)


def tower(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(replace(SHAPE, **changes)).eval().requires_grad_(False)


def pixels(images: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=generator)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.float(), b.float(), dim=-1).min().item()


def prompts(block: int, x: Tensor) -> list[Any]:
    generator = torch.Generator().manual_seed(block)
    shared = torch.randn(1, 3, 64, generator=generator).to(x.dtype)
    return [shared, lambda k, v: (k[:2, :2], v[:2, :2])]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("sources", [None, prompts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_follow_the_plain_tower(
    activation: str, sources: Any, dtype: torch.dtype
) -> None:
    plain = tower(activation=activation)
    eight = copy.deepcopy(plain)
    assert quantize_tower(eight) == 4 * SHAPE.layers
    eight = eight.to(dtype)
    found, expected = eight(pixels(), sources=sources), plain(pixels(), sources=sources)
    assert found.dtype == dtype
    # Two of three blocks round both operands to 4 significant bits: 3 % a product, at most.
    assert 0.99 < cosine(found, expected) < 1 - 1e-6


def test_taps_see_the_same_block_by_block() -> None:
    plain = tower()
    eight = copy.deepcopy(plain)
    quantize_tower(eight)
    seen: dict[str, list[Tensor]] = {"plain": [], "eight": []}
    plain(pixels(), tap=lambda block, q, k, v, out: seen["plain"].extend([q, k, v, out]))
    eight(pixels(), tap=lambda block, q, k, v, out: seen["eight"].extend([q, k, v, out]))
    assert len(seen["eight"]) == 4 * SHAPE.layers
    for found, expected in zip(seen["eight"], seen["plain"], strict=True):
        assert found.shape == expected.shape
        assert cosine(found.flatten(1), expected.flatten(1)) > 0.99


def test_weights_keep_their_names() -> None:
    plain = tower()
    eight = copy.deepcopy(plain)
    quantize_tower(eight)
    assert isinstance(eight.blocks[0], EightBitBlock)
    assert eight.state_dict().keys() == plain.state_dict().keys()


def test_what_cannot_run_in_8_bits() -> None:
    with pytest.raises(UserError, match="not for a ResNet"):
        quantize_tower(nn.Linear(2, 2))
    made = VisionTransformer(SHAPE, control_point=lambda width: nn.Identity())
    with pytest.raises(UserError, match="temporal modules"):
        quantize_tower(made)
