"""What `kineticlip bench --tune` runs: every kernel at an engine shape, and what to try there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kineticlip_kernels import attention, evl, fp8, head, mlp, norm, patches, temporal
from kineticlip_kernels.tune import Run, Target, grid

Maker = Callable[[torch.device], Run]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shapes that are run; ViT-L/14-336 with 32 frames unless told otherwise."""

    frames: int = 32
    side: int = 24  # patches along an edge
    width: int = 1024
    heads: int = 16
    clips: int = 16  # of a training step
    views: int = 12
    videos: int = 64
    classes: int = 400
    names: int = 100_000  # of a vocabulary
    pixels: tuple[int, int] = (720, 1280)
    crop: int = 336

    @property
    def patches(self) -> int:
        return self.side**2

    @property
    def tokens(self) -> int:
        return self.patches + 1

    @property
    def rows(self) -> int:
        return self.frames * self.tokens


def targets(at: Sizes | None = None) -> tuple[Target, ...]:
    """All of them; at: other shapes than the engine's."""
    at = at or Sizes()
    return (*_trunk(at), *_attention(at), *_head(at), *_frames(at), *_evl(at))


def _trunk(at: Sizes) -> tuple[Target, ...]:
    add_layer_norm = partial(norm.add_layer_norm, impl="triton")
    bias_quick_gelu = partial(mlp.bias_quick_gelu, impl="triton")
    linear_quick_gelu = partial(mlp.linear_quick_gelu, impl="triton")
    stream = ((at.rows, at.width), (at.rows, at.width), (at.width,), (at.width,))
    hidden = ((at.rows, 4 * at.width), (4 * at.width,))
    linear = ((at.rows, at.width), (4 * at.width, at.width), (4 * at.width,))
    tiles = grid(
        BLOCK_M=(128, 256), BLOCK_N=(128, 256), BLOCK_K=(64,), GROUP_M=(8,), num_warps=(4, 8),
        num_stages=(3, 4),
    )  # fmt: skip
    tiles_fp8 = grid(
        BLOCK_M=(128,), BLOCK_N=(128, 256), BLOCK_K=(64, 128), GROUP_M=(8,), num_warps=(4, 8),
        num_stages=(3, 4),
    )  # fmt: skip

    def quantize(device: torch.device) -> Run:
        return partial(fp8.quantize_rows, randn(at.rows, at.width, device=device), impl="triton")

    def multiply_fp8(device: torch.device) -> Run:
        x = fp8.quantize_rows(randn(at.rows, at.width, device=device))
        weight = fp8.quantize_rows(randn(4 * at.width, at.width, device=device))
        return partial(fp8.linear_fp8, x, weight, impl="triton")

    row_bytes, rows = {"row_bytes": 2 * at.width}, {"rows": at.rows}
    return (
        Target(
            "layer_norm_forward",
            row_bytes,
            forward_of(add_layer_norm, *stream),
            grid(BLOCK_ROWS=(1, 2, 4, 8), num_warps=(2, 4, 8)),
        ),
        Target(
            "layer_norm_backward",
            row_bytes,
            backward_of(add_layer_norm, *stream),
            grid(BLOCK_ROWS=(1, 2, 4), PROGRAMS=(264, 528, 1056), num_warps=(4, 8)),
        ),
        Target(
            "bias_quick_gelu_forward",
            {"width": 4 * at.width},
            forward_of(bias_quick_gelu, *hidden),
            grid(BLOCK_ROWS=(1, 2, 4), BLOCK_F=(1024, 2048), num_warps=(4, 8)),
        ),
        Target(
            "bias_quick_gelu_backward",
            {"width": 4 * at.width},
            backward_of(bias_quick_gelu, *hidden),
            grid(BLOCK_ROWS=(2, 4, 8), BLOCK_F=(256, 512), PROGRAMS=(132, 264), num_warps=(4, 8)),
        ),
        Target(
            "linear_quick_gelu", rows | {"keep": 0}, forward_of(linear_quick_gelu, *linear), tiles
        ),
        Target(
            "linear_quick_gelu", rows | {"keep": 1}, recording(linear_quick_gelu, *linear), tiles
        ),
        Target("quantize_rows", {"width": at.width}, quantize, grid(num_warps=(1, 2, 4))),
        Target("linear_fp8", rows, multiply_fp8, tiles_fp8),
    )


def _attention(at: Sizes) -> tuple[Target, ...]:
    attend = partial(attention.attention, impl="triton")
    attend_class = partial(attention.class_attention, heads=at.heads, impl="triton")
    attend_frames = partial(temporal.frame_attention, impl="triton")
    head_width = at.width // at.heads
    qkv = (at.frames, at.tokens, 3, at.heads, head_width)
    video = (at.clips, at.frames, 3, at.heads, head_width)
    block = ((at.frames, at.tokens, at.width), (3 * at.width, at.width), (3 * at.width,))
    tiles = grid(BLOCK_M=(64, 128), BLOCK_N=(64, 128), num_warps=(4, 8), num_stages=(2, 3))
    widths, forward, backward = {"head_width": head_width}, forward_of, backward_of
    return (
        Target("attention_forward", widths, forward(attend, qkv), tiles),
        Target(
            "attention_backward_delta",
            widths,
            backward(attend, qkv),
            grid(BLOCK_ROWS=(32, 64, 128), num_warps=(4, 8)),
        ),
        Target("attention_backward_keys", widths, backward(attend, qkv), tiles),
        Target("attention_backward_queries", widths, backward(attend, qkv), tiles),
        Target(
            "class_attention_forward",
            {"width": at.width},
            forward(attend_class, *block),
            grid(BLOCK_N=(16, 32, 64), num_warps=(8, 16), num_stages=(1, 2)),
        ),
        Target(
            "class_attention_backward",
            {"width": at.width},
            backward(attend_class, *block),
            grid(BLOCK_N=(16, 32), num_warps=(8, 16), num_stages=(1,)),
        ),
        Target(
            "frame_attention",
            {"frames": at.frames, "itemsize": 2},
            forward(attend_frames, video),
            grid(num_warps=(1, 2, 4)),
        ),
        Target(
            "frame_attention_backward",
            {"frames": at.frames, "itemsize": 2},
            backward(attend_frames, video),
            grid(num_warps=(2, 4, 8)),
        ),
    )


def _head(at: Sizes) -> tuple[Target, ...]:
    def loss_of(device: torch.device, rows: int) -> Run:
        x, classes = (randn(n, at.width, device=device, grad=True) for n in (rows, at.classes))
        labels = torch.zeros(rows, dtype=torch.int64, device=device)
        scale = torch.full((1,), 10.0, device=device)

        def run() -> Any:
            loss = head.class_cross_entropy(x, classes, labels, scale, impl="triton")
            return torch.autograd.grad(loss.sum(), [x, classes])

        return run

    def top_of(device: torch.device) -> Run:
        views = randn(at.videos, at.views, at.width, device=device)
        names = randn(at.names, at.width, device=device)
        return partial(head.top_classes, views, names, 5, impl="triton")

    logits = grid(
        BLOCK_C=(64, 128), BLOCK_R=(16, 64), BLOCK_E=(64,), num_warps=(4, 8), num_stages=(3, 4)
    )
    return (
        Target(
            "mean_normalize",
            {"width": at.width},
            forward_of(partial(head.mean_normalize, impl="triton"),
                       (at.clips, at.frames, at.width)),
            grid(BLOCK_T=(2, 4, 8), num_warps=(2, 4, 8)),
        ),
        Target(
            "class_logits",
            {"rows": at.clips, "itemsize": 2},
            partial(loss_of, rows=at.clips),
            logits,
        ),
        Target(
            "class_logits",
            {"rows": at.clips * at.frames, "itemsize": 2},
            partial(loss_of, rows=at.clips * at.frames),
            logits,
        ),
        Target(
            "top_classes",
            {"itemsize": 2},
            top_of,
            grid(PROGRAMS=(132, 264), BLOCK_C=(64, 128), BLOCK_R=(16,), BLOCK_E=(64,),
                 num_warps=(4, 8), num_stages=(3, 4)),
        ),
        Target(
            "mean_softmax",
            {"classes": at.classes},
            forward_of(partial(head.mean_softmax, impl="triton"),
                       (at.videos, at.views, at.classes)),
            grid(num_warps=(1, 2, 4)),
        ),
    )  # fmt: skip


def _frames(at: Sizes) -> tuple[Target, ...]:
    def cut(device: torch.device) -> Run:
        height, width = at.pixels
        frames = torch.randint(
            0, 256, (at.frames, height, width, 3), dtype=torch.uint8, device=device
        )
        resized = at.crop * width // height
        left, right = 0, resized - at.crop
        crops = [(x, 0, False) for x in (left, right // 2, right)]
        return partial(
            patches.cut_crops, frames, crops, width=resized, height=at.crop, side=at.crop,
            impl="triton",
        )  # fmt: skip

    def unfold(device: torch.device) -> Run:
        shape = (at.frames, 3, at.crop, at.crop)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        return partial(
            patches.unfold_patches, pixels, at.crop // at.side, dtype=torch.bfloat16, impl="triton"
        )

    blocks = grid(BLOCK_ROWS=(4, 8, 16), BLOCK_COLUMNS=(64, 128), num_warps=(4, 8))
    return (
        Target("cut_columns", {}, cut, blocks),
        Target("cut_rows", {}, cut, blocks),
        Target("unfold_patches", {}, unfold, blocks),
    )


def _evl(at: Sizes) -> tuple[Target, ...]:
    neighbours = partial(evl.neighbour_maps, impl="triton")
    displace = partial(evl.displacement, grid=(at.side, at.side), impl="triton")
    queries = (1, at.frames, at.tokens, at.heads, at.width // at.heads)
    offsets = (2 * at.side - 1) ** 2
    maps = ((2, 1, at.frames - 1, at.patches, at.patches), *2 * ((offsets, at.width),))

    def attend(query: Tensor, tokens: Tensor, *terms: Tensor) -> Tensor:
        weight, bias, position, motion = terms
        return evl.attend_tokens(
            query,
            tokens,
            conv_weight=weight,
            conv_bias=bias,
            position=position,
            motion=motion,
            impl="triton",
        )

    tokens = (
        (1, at.heads, at.width),
        (1, at.frames, at.tokens, at.width),
        (at.width, 1, 3),
        (at.width,),
        (at.frames, at.width),
        (1, at.frames, at.patches, at.width),
    )
    images = {"images": at.frames, "itemsize": 2}
    between = {"images": at.frames - 1, "itemsize": 2}
    pairs = grid(BLOCK_P=(64, 128), BLOCK_R=(64, 128), num_warps=(4, 8), num_stages=(2, 3))
    columns = grid(BLOCK_N=(32, 64), BLOCK_C=(64, 128), num_warps=(4, 8), num_stages=(2, 3))
    sums = grid(
        BLOCK_C=(64, 128), BLOCK_L=(16, 32), BLOCK_R=(64,), num_warps=(4, 8), num_stages=(3, 4)
    )
    return (
        Target("neighbour_log_sums", {}, forward_of(neighbours, queries, queries), pairs),
        Target("neighbour_maps", {}, forward_of(neighbours, queries, queries), pairs),
        Target("neighbour_gradients", {}, backward_of(neighbours, queries, queries), pairs),
        Target("displacement", images, forward_of(displace, *maps), sums),
        Target(
            "displacement_maps",
            between,
            backward_of(displace, *maps),
            grid(BLOCK_R=(64, 128), BLOCK_L=(16, 32), BLOCK_C=(64,), num_warps=(4, 8),
                 num_stages=(3, 4)),
        ),
        Target(
            "displacement_weights",
            {"itemsize": 2},
            backward_of(displace, *maps),
            grid(BLOCK_C=(64, 128), BLOCK_L=(32, 64), num_warps=(4, 8), num_stages=(2, 3)),
        ),
        Target("attend_tokens_scores", {}, forward_of(attend, *tokens), columns),
        Target("attend_tokens_mix", {}, forward_of(attend, *tokens), columns),
        Target(
            "attend_tokens_gradients",
            {},
            backward_of(attend, *tokens),
            grid(BLOCK_N=(16, 32), BLOCK_C=(64, 128), num_warps=(4, 8), num_stages=(2,)),
        ),
        Target(
            "attend_tokens_input",
            {},
            backward_of(attend, *tokens),
            grid(BLOCK_N=(4, 8, 16), BLOCK_C=(128, 256), num_warps=(4, 8)),
        ),
    )  # fmt: skip


def randn(*shape: int, device: torch.device, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_(grad)


def recording(op: Callable[..., Any], *shapes: tuple[int, ...]) -> Maker:
    """A maker: op on tensors that want gradients, as in a training step's forward."""

    def make(device: torch.device) -> Run:
        inputs = [randn(*shape, device=device, grad=True) for shape in shapes]
        return lambda: op(*inputs)

    return make


def forward_of(op: Callable[..., Any], *shapes: tuple[int, ...]) -> Maker:
    """A maker: op on fresh bf16 tensors, nothing recorded."""

    def make(device: torch.device) -> Run:
        inputs = [randn(*shape, device=device) for shape in shapes]
        return lambda: op(*inputs)

    return make


def backward_of(op: Callable[..., Any], *shapes: tuple[int, ...]) -> Maker:
    """A maker: the backward pass of op alone."""

    def make(device: torch.device) -> Run:
        inputs = [randn(*shape, device=device, grad=True) for shape in shapes]
        outputs = op(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.randn_like(out) for out in outputs]
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    return make
