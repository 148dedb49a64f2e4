"""Gradients of keys and values in Triton. Letters: see sets_triton.py."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kineticlip_kernels.attention.sets_triton import LOG2_E, load_queries, load_tile, store_tile
from kineticlip_kernels.launch import ceil_div, power_of_two
from kineticlip_kernels.tuning import blocks


@triton.jit
def _add_step(grad_k, grad_v, k, v, q, grad, lse, delta, scale):
    """dk / scale and dv with one tile of queries more."""
    scores = tl.dot(k, q.T, input_precision="ieee") * scale
    weights = tl.exp2(scores - lse[None, :])  # [BLOCK_N, BLOCK_M]
    grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision="ieee")
    grad_weights = tl.dot(v, grad.T, input_precision="ieee")
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit
def _backward_keys(
    q_ptr,  # [M, N, H, K]
    k_ptr,  # one set: [M', n, H, K]
    v_ptr,
    grad_ptr,  # [M, N, H, K]: gradient of the output
    lse_ptr,  # fp32 [M, H, N]
    delta_ptr,  # fp32 [M, H, N]
    grad_k_ptr,  # [splits, M', n, H, K]
    grad_v_ptr,
    q_image_stride,
    q_token_stride,
    key_row,
    key_token,
    value_row,
    value_token,
    grad_split,  # strides of the two gradients
    grad_row,
    grad_token,
    N,
    H,
    length,  # n
    share,  # M / M'
    splits,  # programs that divide the images of a row among them
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dv = p^T do and dk = ds^T q / sqrt(K), with ds = p (do v^T - delta), over all queries."""
    tiles = tl.cdiv(length, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N
    head = tl.program_id(0) // tiles % H
    split = (tl.program_id(0) // tiles // H % splits).to(tl.int64)
    row = (tl.program_id(0) // tiles // H // splits).to(tl.int64)
    k = load_tile(k_ptr + row * key_row + head * K, first, length, key_token, K, BLOCK_K, BLOCK_N)
    v = load_tile(
        v_ptr + row * value_row + head * K, first, length, value_token, K, BLOCK_K, BLOCK_N
    )
    grad_k = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    q_tiles = tl.cdiv(N, BLOCK_M)
    images = tl.cdiv(share, splits)
    begin = split * images
    count = tl.maximum(tl.minimum(images, share - begin), 0)
    for step in range(0, (count * q_tiles).to(tl.int32)):
        image = row * share + begin + step // q_tiles
        start = step % q_tiles * BLOCK_M
        queries = q_ptr + image * q_image_stride + head * K
        q, grad, lse, delta = load_queries(
            queries, grad_ptr, lse_ptr, delta_ptr, image, head, start, q_token_stride, N, H, K,
            BLOCK_K, BLOCK_M,
        )  # fmt: skip
        grad_k, grad_v = _add_step(grad_k, grad_v, k, v, q, grad, lse, delta, scale)
    place = split * grad_split + row * grad_row + head * K
    grad_k = grad_k * (scale * 0.6931471805599453)  # ln 2: scale is for powers of two
    store_tile(grad_k_ptr + place, grad_k, first, length, grad_token, K, BLOCK_K, BLOCK_N)
    store_tile(grad_v_ptr + place, grad_v, first, length, grad_token, K, BLOCK_K, BLOCK_N)


def launch_keys(
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Fills grad_k and grad_v, [splits, M', n, H, K] of equal strides."""
    images, tokens, _, heads, width = qkv.shape
    rows, length = k.shape[:2]
    splits = len(grad_k)
    block = blocks("attention_backward_keys", qkv.device, head_width=width)
    _backward_keys[(ceil_div(length, block["BLOCK_N"]) * heads * splits * rows,)](
        qkv,
        k,
        v,
        grad,
        lse,
        delta,
        grad_k,
        grad_v,
        *qkv.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *grad_k.stride()[:3],
        tokens,
        heads,
        length,
        images // rows,
        splits,
        width**-0.5 * LOG2_E,
        K=width,
        BLOCK_K=max(power_of_two(width), 16),
        **block,
    )
