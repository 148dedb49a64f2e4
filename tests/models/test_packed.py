"""Towers made ready for the steady state say what the plain tower says."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kineticlip.config import EvalPrecision
from kineticlip.models.architectures import VisionShape, architecture
from kineticlip.models.packed import (
    ByteLinear,
    PackedLinear,
    compile_bytes,
    fused_quantise,
    pack_tower,
    quantise_rows,
)
from kineticlip.models.steady import SteadyTower, compiled
from kineticlip.models.vision import VisionTransformer
from kineticlip.runtime.errors import UserError

CPU = torch.device("cpu")


def tower(seed: int = 0, **changes: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    shape = architecture("ViT-tiny-16").vision
    assert isinstance(shape, VisionShape)
    made = VisionTransformer(replace(shape, **changes))
    return made.eval().requires_grad_(False)


def pixels(images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, 3, 64, 64), dtype=torch.uint8, generator=generator)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.float(), b.float(), dim=-1).min().item()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.9999), ("int8", 0.9995)])
def test_packed_towers_follow_the_fp32_tower(
    activation: str, precision: EvalPrecision, bound: float
) -> None:
    plain = tower(activation=activation)
    packed = copy.deepcopy(plain)
    kind = ByteLinear if precision == "int8" else PackedLinear
    assert pack_tower(packed, precision) == 4 * len(plain.blocks)
    assert sum(isinstance(part, kind) for part in packed.modules()) == 4 * len(plain.blocks)
    with torch.inference_mode():
        assert cosine(packed.bfloat16()(pixels(5)), plain(pixels(5))) > bound


def test_a_packed_tower_is_no_less_exact_than_a_cast_one() -> None:
    plain = tower()
    cast, packed = copy.deepcopy(plain).bfloat16(), copy.deepcopy(plain)
    pack_tower(packed, "bf16")
    with torch.inference_mode():
        truth = plain(pixels(8))
        errors = [(made(pixels(8)) - truth).norm() for made in (cast, packed.bfloat16())]
    assert errors[1] <= 1.5 * errors[0]


def test_a_row_of_bytes_is_within_half_a_step() -> None:
    x = torch.cat([torch.randn(70, 24), torch.zeros(1, 24), 1e4 * torch.randn(1, 24)]).bfloat16()
    values, scale = quantise_rows(x)
    restored = (values.float() - 128) * scale
    assert ((restored - x.float()).abs() <= 0.5001 * scale).all()
    assert values.dtype == torch.uint8 and values[70].eq(128).all()


def test_bytes_products_are_exact_where_rounding_is() -> None:
    weight = torch.randint(-127, 128, (16, 32)).float()
    weight[:, 0] = 127
    x = torch.randint(-127, 128, (3, 5, 32)).float()
    x[..., 0] = 127
    layer = ByteLinear(weight, torch.zeros(16))
    torch.testing.assert_close(layer(x.bfloat16()).float(), x @ weight.T, rtol=2**-8, atol=1.0)


def test_fp32_is_left_alone_and_resnets_too() -> None:
    assert pack_tower(tower(), "fp32") == 0
    assert pack_tower(nn.Linear(2, 2), "bf16") == 0
    with pytest.raises(UserError, match="not for a ResNet"):
        pack_tower(nn.Linear(2, 2), "int8")


def test_a_steady_tower_shows_one_shape_and_changes_nothing() -> None:
    plain, shapes = tower(), []

    def run(batch: Tensor) -> Tensor:
        shapes.append(len(batch))
        return plain(batch)

    steady = SteadyTower(plain, run, 4)
    with torch.inference_mode():
        for images in (1, 2, 3, 4, 5):
            torch.testing.assert_close(
                steady(pixels(images)), plain(pixels(images)), atol=1e-6, rtol=1e-6
            )
        taps: list[int] = []
        steady(pixels(4), tap=lambda block, q, k, v, out: taps.append(block))
    assert shapes == [4, 4]  # of 3 and 4 images; fewer and more go to the tower itself
    assert taps == list(range(len(plain.blocks)))
    assert steady.blocks[0] is plain.blocks[0] and steady.shape is plain.shape


def test_what_is_left_of_a_run_has_few_batch_sizes() -> None:
    """cuDNN plans its attention anew, 0.4 s each time, for every batch size that is new to it."""
    plain, shapes = tower(layers=1), []

    class Seen(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            shapes.append(len(batch))
            return plain(batch)

    steady = SteadyTower(Seen(), plain, 16, remainders=(2, 4))
    with torch.inference_mode():
        for images in (1, 2, 3, 4, 7):
            expected = plain(pixels(images))
            torch.testing.assert_close(steady(pixels(images)), expected, atol=1e-6, rtol=1e-6)
    assert shapes == [2, 2, 4, 4, 7]


def test_a_compiled_tower_says_the_same() -> None:
    plain = tower(layers=1)
    with torch.inference_mode():
        steady = compiled(plain, 2, backend="aot_eager")  # Inductor itself takes 10 s
        torch.testing.assert_close(steady(pixels(2)), plain(pixels(2)), atol=1e-5, rtol=1e-5)


def test_the_loop_for_a_compiler_says_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 48, generator=generator).bfloat16()
    values, scale = quantise_rows(x)
    fused_values, fused_scale = fused_quantise(x)
    assert torch.equal(values, fused_values) and torch.equal(scale, fused_scale)


def test_a_compiled_int8_tower_says_the_same() -> None:
    plain = tower(layers=1)
    pack_tower(plain, "int8")
    plain.bfloat16()
    with torch.inference_mode():
        before = plain(pixels(3))
        compile_bytes(plain, backend="aot_eager")  # Inductor itself takes 10 s
        assert cosine(plain(pixels(3)), before) > 0.9999


class Operators(TorchDispatchMode):
    """Notes every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_forward_brings_nothing_from_the_host() -> None:
    """torch.tensor of plain numbers is a copy to the GPU, which a CUDA graph cannot record."""
    with Operators() as made:
        torch.tensor([1.0, 2.0])
    assert "lift_fresh" in made.names
    with torch.no_grad(), Operators() as seen:
        tower().bfloat16()(pixels(2))
    assert "native_layer_norm" in seen.names
    assert not seen.names & {"lift_fresh", "item", "_local_scalar_dense", "nonzero"}
