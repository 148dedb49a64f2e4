"""Multi-head attention in Triton, on packed projections and several sets of keys and values.

Shape letters as in sets_triton.py. The sets are attended one after the other, so
nothing is copied or concatenated. The algorithm is FlashAttention-2 (Dao 2023).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels import launch
from kineticlip_kernels.arithmetic_triton import E4M3_MAX
from kineticlip_kernels.attention.backward_triton import attention_backward
from kineticlip_kernels.attention.sets_triton import (
    LOG2_E,
    key_sets,
    load_tile,
    set_arguments,
    store_tile,
)
from kineticlip_kernels.attention.sources import MAX_SOURCES
from kineticlip_kernels.launch import FusedOp, ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _forward(
    q_ptr,  # [M, N, H, K], images q_image_stride and tokens q_token_stride apart
    keys,  # tuple of [M', n, H, K]
    values,  # tuple of the same
    strides,  # tuple of (key row, key token, value row, value token) strides
    lengths,  # tuple of n
    shares,  # tuple of M / M'
    out_ptr,  # [M, N, H, K], contiguous; e4m3 where there is a scale
    lse_ptr,  # fp32 [M, H, N]: log2 of the sum of 2^score; or None
    scale_ptr,  # fp32 [M], what the outputs of an image are divided by; or None
    q_image_stride,
    q_token_stride,
    N,
    H,
    scale,  # log2(e) / sqrt(K)
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles % H
    image = (tl.program_id(0) // tiles // H).to(tl.int64)
    q = load_tile(
        q_ptr + image * q_image_stride + head * K, first, N, q_token_stride, K, BLOCK_K, BLOCK_M
    )
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for index in tl.static_range(len(keys)):
        key_row, key_token, value_row, value_token = strides[index]
        row = image // shares[index]
        k_ptr = keys[index] + row * key_row + head * K
        v_ptr = values[index] + row * value_row + head * K
        length = lengths[index]
        for start in range(0, length, BLOCK_N):
            k = load_tile(k_ptr, start, length, key_token, K, BLOCK_K, BLOCK_N)
            scores = tl.dot(q, k.T, input_precision="ieee") * scale
            known = start + tl.arange(0, BLOCK_N) < length
            scores = tl.where(known[None, :], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
            total = total * shrink + tl.sum(weights, axis=1)
            v = load_tile(v_ptr, start, length, value_token, K, BLOCK_K, BLOCK_N)
            mixed = mixed * shrink[:, None]
            mixed = tl.dot(weights.to(v.dtype), v, mixed, input_precision="ieee")
            highest = new_highest
    out = out_ptr + image * N * H * K + head * K
    mixed = mixed / total[:, None]
    if scale_ptr is not None:
        mixed = mixed / tl.load(scale_ptr + image)
        # Weights are rounded before the product: their sum may pass one by that much.
        mixed = tl.minimum(tl.maximum(mixed, -E4M3_MAX), E4M3_MAX)
    store_tile(out, mixed, first, N, H * K, K, BLOCK_K, BLOCK_M)
    if lse_ptr is not None:
        token = first + tl.arange(0, BLOCK_M)
        lse = lse_ptr + (image * H + head) * N + token
        tl.store(lse, highest + tl.log2(total), mask=token < N)


def attention_triton(qkv: Tensor, *, sources: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
    """The Triton face of `attention`, for at most MAX_SOURCES sources."""
    flat: list[Tensor | None] = [tensor for source in sources for tensor in source]
    flat += [None] * (2 * MAX_SOURCES - len(flat))
    (out,) = _attention(qkv, *flat)
    return out


def _attention_forward(
    qkv: Tensor,
    k0: Tensor | None,
    v0: Tensor | None,
    k1: Tensor | None,
    v1: Tensor | None,
    k2: Tensor | None,
    v2: Tensor | None,
    k3: Tensor | None,
    v3: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """-> (out [M, N, H, K], log2 sums [M, H, N]).

    Parameters as torch.library wants them, each tensor by itself.
    """
    images, tokens, _, heads, width = qkv.shape
    out = launch.empty(images, tokens, heads, width, dtype=qkv.dtype, device=qkv.device)
    lse = launch.empty(images, heads, tokens, dtype=torch.float32, device=qkv.device)
    launch_forward(qkv, (k0, v0, k1, v1, k2, v2, k3, v3), out, lse=lse)
    return out, lse


def launch_forward(
    qkv: Tensor,
    flat: Sequence[Tensor | None],
    out: Tensor,
    *,
    lse: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Fills out, in e4m3 divided by scale [M] where that is given, and lse."""
    qkv = qkv.contiguous()
    images, tokens, _, heads, width = qkv.shape
    if not images or not tokens:
        return
    keys, values = key_sets(qkv, flat)
    block = blocks("attention_forward", qkv.device, head_width=width)
    _forward[(ceil_div(tokens, block["BLOCK_M"]) * heads * images,)](
        qkv,
        keys,
        values,
        *set_arguments(images, keys, values),
        out,
        lse,
        scale,
        *qkv.stride()[:2],
        tokens,
        heads,
        width**-0.5 * LOG2_E,
        K=width,
        BLOCK_K=max(power_of_two(width), 16),
        **block,
    )


_attention = FusedOp(
    "attention",
    _attention_forward,
    attention_backward,
    fake_forward=lambda qkv, *flat: (
        qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:]),
        qkv.new_empty(qkv.shape[0], qkv.shape[3], qkv.shape[1], dtype=torch.float32),
    ),
    fake_backward=lambda flags, qkv, *rest: [
        qkv.new_empty(qkv.shape),
        *(
            qkv.new_empty(
                0 if t is None or not any(flags[i - i % 2 + 1 : i - i % 2 + 3]) else t.shape
            )
            for i, t in enumerate(rest[: 2 * MAX_SOURCES])
        ),
    ],
    save=lambda inputs, outputs: ((*inputs, *outputs), ()),
    results=1,
    spread=tuple(range(1 + 2 * MAX_SOURCES)),
)
