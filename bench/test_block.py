"""A whole ViT block: as CLIP's code has it, in plain PyTorch, compiled, and on the kernels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernel_bench import DEVICE, GPU, SHAPES, Case, Shape, randn, spread
from kineticlip.models.transformer import Block, BlockShape
from kineticlip_kernels import cost


class Upcast(nn.LayerNorm):
    """LayerNorm in fp32 between two casts, as CLIP computes it."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        y = nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return y.to(x.dtype)


class ThreeKernels(nn.Module):
    """QuickGELU, one kernel for each operation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Naive(nn.Module):
    """The straightforward block: nn.MultiheadAttention, nothing fused."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = Upcast(width), Upcast(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": ThreeKernels()}
        self.mlp = nn.Sequential(OrderedDict(**layers, c_proj=nn.Linear(4 * width, width)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


def engine_block(width: int, heads: int, kernels: Any, attention: Any) -> nn.Module:
    shape = BlockShape(width=width, heads=heads, mlp_width=4 * width)
    block = Block(shape, kernels=kernels, attention=attention)
    block.initialise_like_clip(24)
    return block


def blocks(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    width, heads = shape.width, shape.heads
    makers: dict[str, Callable[[], nn.Module]] = {
        "naive": partial(Naive, width, heads),
        "reference": partial(engine_block, width, heads, "reference", "sdpa"),
        "auto": partial(engine_block, width, heads, "auto", "auto"),
    }
    if GPU:
        makers["torch.compile"] = makers["reference"]
        makers["triton"] = partial(engine_block, width, heads, "triton", "triton")
    size, heads_size = (shape.rows, dtype.itemsize), (heads, shape.head_width, dtype.itemsize)
    products = [(1, 3), (1, 1), (1, 4), (4, 1)]
    forward = sum(
        (cost.linear(size[0], d * width, f * width, size[1]) for d, f in products),
        cost.attention(shape.images, shape.tokens, *heads_size),
    )
    forward += cost.add_layer_norm(shape.rows, width, dtype.itemsize)
    both = cost.Cost(3 * forward.flops, 3 * forward.bytes)
    for impl, make_block in makers.items():
        short = shape == SHAPES[0] and dtype == torch.bfloat16
        case = partial(Case, op="block", impl=impl, dtype=dtype, shape=shape, short=short)
        yield case(
            cost=forward,
            make=partial(operands, make_block, shape, dtype, False),
            run=run_block,
        )
        yield case(
            cost=both,
            make=partial(operands, make_block, shape, dtype, True),
            run=run_block,
            direction="forward+backward",
        )


def operands(
    make_block: Callable[[], nn.Module], shape: Shape, dtype: torch.dtype, grad: bool
) -> tuple[Any, ...]:
    """The block's input, the block, and its parameters, so that their gradients are made."""
    block = make_block().to(DEVICE, dtype).requires_grad_(grad)
    x = randn(shape.images, shape.tokens, shape.width, dtype=dtype, grad=grad)
    return x, block, *(list(block.parameters()) if grad else ())


def run_block(x: Tensor, block: nn.Module, *parameters: Tensor) -> Tensor:
    out: Tensor
    if isinstance(block, Block):
        x, update, _ = block(x)
        out = x + update
    else:
        out = block(x)
    return out


CASES = spread(blocks)


def test_block(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["p50_ms"] > 0
