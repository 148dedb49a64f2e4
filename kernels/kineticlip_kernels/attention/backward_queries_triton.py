"""Gradients of queries in Triton. Letters: see sets_triton.py."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels.attention.sets_triton import (
    LOG2_E,
    load_queries,
    load_tile,
    set_arguments,
    store_tile,
)
from kineticlip_kernels.launch import ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _backward_queries(
    q_ptr,  # this and what follows: see forward_triton._forward
    keys,
    values,
    strides,
    lengths,
    shares,
    grad_ptr,  # [M, N, H, K]: gradient of the output
    lse_ptr,  # fp32 [M, H, N]
    delta_ptr,  # fp32 [M, H, N]
    grad_q_ptr,  # strides as q
    q_image_stride,
    q_token_stride,
    N,
    H,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq = ds k / sqrt(K), over all sets of keys."""
    tiles = tl.cdiv(N, BLOCK_M)
    first = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles % H
    image = (tl.program_id(0) // tiles // H).to(tl.int64)
    place = image * q_image_stride + head * K
    q, grad, lse, delta = load_queries(
        q_ptr + place, grad_ptr, lse_ptr, delta_ptr, image, head, first, q_token_stride, N, H, K,
        BLOCK_K, BLOCK_M,
    )  # fmt: skip
    grad_q = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for index in tl.static_range(len(keys)):
        key_row, key_token, value_row, value_token = strides[index]
        row = image // shares[index]
        k_ptr = keys[index] + row * key_row + head * K
        v_ptr = values[index] + row * value_row + head * K
        length = lengths[index]
        for start in range(0, length, BLOCK_N):
            k = load_tile(k_ptr, start, length, key_token, K, BLOCK_K, BLOCK_N)
            v = load_tile(v_ptr, start, length, value_token, K, BLOCK_K, BLOCK_N)
            scores = tl.dot(q, k.T, input_precision="ieee") * scale
            # Keys behind the end score zero, at times far above real scores: their weight, in 16
            # bits infinite, would make NaN of their zeros. Masking scores spills on sm_100.
            known = (start + tl.arange(0, BLOCK_N) < length)[None, :]
            weights = tl.where(known, tl.exp2(scores - lse[:, None]), 0.0)
            grad_weights = tl.dot(grad, v.T, input_precision="ieee")
            grad_scores = weights * (grad_weights - delta[:, None])
            grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")
    grad_q = grad_q * (scale * 0.6931471805599453)
    store_tile(grad_q_ptr + place, grad_q, first, N, q_token_stride, K, BLOCK_K, BLOCK_M)


def launch_queries(
    qkv: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_qkv: Tensor,
) -> None:
    """Fills the queries' part of grad_qkv."""
    images, tokens, _, heads, width = qkv.shape
    block = blocks("attention_backward_queries", qkv.device, head_width=width)
    _backward_queries[(ceil_div(tokens, block["BLOCK_M"]) * heads * images,)](
        qkv,
        keys,
        values,
        *set_arguments(images, keys, values),
        grad,
        lse,
        delta,
        grad_qkv,
        *qkv.stride()[:2],
        tokens,
        heads,
        width**-0.5 * LOG2_E,
        K=width,
        BLOCK_K=max(power_of_two(width), 16),
        **block,
    )
