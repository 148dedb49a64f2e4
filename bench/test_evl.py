"""EVL's decoder: each op, and what a layer does with the tokens, as usually written and as here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench import DTYPES, GPU, Case, Shape, randn
from kineticlip_kernels import cost_methods, evl
from kineticlip_kernels.cost import Cost


@dataclass(frozen=True)
class Clip:
    """B clips of T frames on a square grid; the decoder has as many heads as the trunk."""

    name: str
    clips: int
    frames: int
    side: int
    width: int
    heads: int

    @property
    def tokens(self) -> int:
        return self.side * self.side + 1

    @property
    def shape(self) -> Shape:
        return Shape(self.name, self.clips * self.frames, self.tokens, self.width, self.heads)


SIZES = (
    (
        Clip("L/14-336, 1 x 32 frames", 1, 32, 24, 1024, 16),
        Clip("B/16, 8 x 8 frames", 8, 8, 14, 768, 12),
    )
    if GPU
    else (Clip("B/16, 1 x 8 frames", 1, 8, 14, 768, 12),)
)
FACES: list[evl.EvlImpl] = ["reference", "lean", "triton"] if GPU else ["reference", "lean"]


def usual_layer(
    query: Tensor,
    tokens: Tensor,
    qk: Tensor,
    offset_weights: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    position: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
) -> Tensor:
    """Maps of all frames at once, weights gathered for every pair of patches, K and V projected."""
    clips, _, count, width = tokens.shape
    heads, grid = qk.shape[4], int((count - 1) ** 0.5)
    table = evl.offsets((grid, grid), tokens.device)
    maps = evl.neighbour_maps_reference(*qk)
    before, after = (
        torch.einsum("btpr,prc->btpc", part, weight[table])
        for part, weight in zip(maps, offset_weights, strict=True)
    )
    motion = F.pad(before, (0, 0, 0, 0, 1, 0)) + F.pad(after, (0, 0, 0, 0, 0, 1))
    series = tokens.permute(0, 2, 3, 1).flatten(0, 1)  # [B * N, C, T]
    series = F.conv1d(series, conv_weight, conv_bias, padding=1, groups=width)
    f = tokens + series.unflatten(0, (clips, count)).permute(0, 3, 1, 2)
    f = f + position[:, None] + F.pad(motion, (0, 0, 1, 0))
    y = F.layer_norm(f, (width,)).flatten(1, 2)
    k, v = (F.linear(y, w).unflatten(2, (heads, -1)) for w in (key_weight, value_weight))
    q = query.unflatten(1, (heads, -1)) * (width // heads) ** -0.5  # [B, Q, D / Q]
    weights = torch.einsum("bqd,bnqd->bqn", q, k).softmax(dim=-1)
    return torch.einsum("bqn,bnqd->bqd", weights, v).flatten(1)


def layer(
    query: Tensor,
    tokens: Tensor,
    qk: Tensor,
    offset_weights: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    position: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    *,
    impl: evl.EvlImpl,
) -> Tensor:
    """The same on the three ops."""
    grid = int((tokens.shape[2] - 1) ** 0.5)
    maps = evl.neighbour_maps(qk[0], qk[1], impl=impl)
    motion = evl.displacement(
        maps, offset_weights[0], offset_weights[1], grid=(grid, grid), impl=impl
    )
    one = torch.ones_like(conv_bias)
    absorbed = evl.absorb_query(query, one, key_weight, heads=qk.shape[4])
    mixed = evl.attend_tokens(
        absorbed,
        tokens,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        position=position,
        motion=motion,
        impl=impl,
    )
    return evl.project_mixed(mixed, one, one - 1, value_weight, one - 1)


def layers(clip: Clip, dtype: torch.dtype) -> Iterator[Case]:
    """The trunk is frozen: gradients for everything but tokens, q and k."""
    width = clip.width

    def make(grad: bool) -> tuple[Tensor, ...]:
        draw = partial(randn, dtype=dtype)
        images = (clip.clips, clip.frames, clip.tokens)
        tokens = draw(*images, width)
        qk = draw(2, *images, clip.heads, width // clip.heads)
        weights = [
            draw(*size, scale=width**-0.5, grad=grad)
            for size in (
                (2, (2 * clip.side - 1) ** 2, width),
                (width, 1, 3),
                (width,),
                (clip.frames, width),
                (width, width),
                (width, width),
            )
        ]
        return draw(clip.clips, width, grad=grad), tokens, qk, *weights

    faces: dict[str, Callable[..., Any]] = {"usual": usual_layer}
    faces |= {impl: partial(layer, impl=impl) for impl in FACES[1:]}
    for (impl, face), grad in itertools.product(faces.items(), (False, True)):
        yield Case(
            op="evl layer",
            impl=impl,
            dtype=dtype,
            shape=clip.shape,
            cost=layer_cost(clip, dtype.itemsize, grad),
            make=partial(make, grad),
            run=face,
            direction="forward+backward" if grad else "forward",
        )


def layer_cost(clip: Clip, itemsize: int, grad: bool) -> Cost:
    """The maps of a frozen trunk have no backward pass."""
    grid, patches = (clip.side, clip.side), clip.side**2
    size = (clip.clips, clip.frames)
    total = cost_methods.neighbour_maps(*size, patches, clip.width, itemsize)
    for backward in (False, True)[: 1 + grad]:
        total += cost_methods.displacement(*size, grid, clip.width, itemsize, backward=backward)
        total += cost_methods.attend_tokens(
            *size, clip.tokens, clip.width, clip.heads, itemsize, backward=backward
        )
    return total


def maps(clip: Clip, dtype: torch.dtype) -> Iterator[Case]:
    size = (clip.clips, clip.frames, clip.side**2, clip.width, dtype.itemsize)

    def make() -> tuple[Tensor, Tensor]:
        head = clip.width // clip.heads
        qk = randn(2, clip.clips, clip.frames, clip.tokens, clip.heads, head, dtype=dtype)
        return qk[0], qk[1]

    for impl in FACES:
        run = partial(evl.neighbour_maps, impl=impl)
        cost = cost_methods.neighbour_maps(*size)
        yield Case("neighbour_maps", impl, dtype, clip.shape, cost, make, run)


def sums(clip: Clip, dtype: torch.dtype) -> Iterator[Case]:
    grid = (clip.side, clip.side)
    size = (clip.clips, clip.frames, grid, clip.width, dtype.itemsize)

    def make() -> tuple[Tensor, ...]:
        patches = clip.side**2
        attention = randn(2, clip.clips, clip.frames - 1, patches, patches, dtype=dtype)
        weights = (
            randn((2 * clip.side - 1) ** 2, clip.width, dtype=dtype, grad=True) for _ in range(2)
        )
        return attention.softmax(dim=-1), *weights

    cost = cost_methods.displacement(*size) + cost_methods.displacement(*size, backward=True)
    for impl in FACES:
        run = partial(evl.displacement, grid=grid, impl=impl)
        yield Case("displacement", impl, dtype, clip.shape, cost, make, run, "forward+backward")


def queries(clip: Clip, dtype: torch.dtype) -> Iterator[Case]:
    """The absorbed queries of all heads over the tokens of a clip, every term added to them."""

    def attend(
        query: Tensor,
        tokens: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        position: Tensor,
        motion: Tensor,
        *,
        impl: evl.EvlImpl,
    ) -> Tensor:
        return evl.attend_tokens(
            query,
            tokens,
            conv_weight=conv_weight,
            conv_bias=conv_bias,
            position=position,
            motion=motion,
            impl=impl,
        )

    def make() -> tuple[Tensor, ...]:
        images, width = (clip.clips, clip.frames), clip.width
        sizes = [(clip.clips, clip.heads, width), (*images, clip.tokens, width), (width, 1, 3)]
        sizes += [(width,), (clip.frames, width), (*images, clip.tokens - 1, width)]
        return tuple(randn(*size, dtype=dtype, scale=0.1) for size in sizes)

    size = (clip.clips, clip.frames, clip.tokens, clip.width, clip.heads, dtype.itemsize)
    cost = cost_methods.attend_tokens(*size)
    for impl in FACES:
        run = partial(attend, impl=impl)
        yield Case("attend_tokens", impl, dtype, clip.shape, cost, make, run)


CASES = [
    case
    for clip, dtype, family in itertools.product(SIZES, DTYPES, (layers, maps, sums, queries))
    for case in family(clip, dtype)
]


def test_evl(case: Case, measure: Callable[[Case], dict[str, Any]]) -> None:
    assert measure(case)["p50_ms"] > 0
