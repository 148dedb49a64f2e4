"""The faces of `attention` that PyTorch and xformers give: chunked, sdpa, xformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.attention.sources import Source, with_sources
from kineticlip_kernels.dispatch import dtype_name

CHUNK = 1 << 20  # scores at a time on the CPU: 2 MiB of bf16 stay in its cache
# Looked up once, as Triton is: torch.compile does not trace through find_spec.
XFORMERS_INSTALLED = importlib.util.find_spec("xformers") is not None


def attention_chunked(qkv: Tensor, *, sources: Sequence[Source] = ()) -> Tensor:
    """Matrix products and softmax on a few heads at a time: the fastest in bf16 on a CPU.

    All heads at once leave the cache, and SDPA's CPU kernel is slower at these shapes
    (bench/cpu_choices.py). Keeps nothing for a backward pass.
    """
    q, k, v = (part.transpose(1, 2) for part in with_sources(qkv, sources))  # [M, H, N, K]
    images, heads, tokens, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format).flatten(0, 1)
    q, k, v = (q * width**-0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # [M H, N, K]
    step = max(CHUNK // max(tokens * k.shape[1], 1), 1)
    for first in range(0, len(q), step):
        part = slice(first, first + step)
        weights = torch.bmm(q[part], k[part].transpose(1, 2)).softmax(dim=-1)
        torch.bmm(weights, v[part], out=out[part])
    return out.view(images, heads, tokens, width).transpose(1, 2)


def attention_sdpa(qkv: Tensor, *, sources: Sequence[Source] = ()) -> Tensor:
    """PyTorch's fused attention; sources are appended to the keys, which copies k and v."""
    q, k, v = (part.transpose(1, 2) for part in with_sources(qkv, sources))  # [M, H, N, K]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_xformers(qkv: Tensor, *, sources: Sequence[Source] = ()) -> Tensor:
    """xformers' memory-efficient attention; sources are appended, which copies k and v."""
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(*with_sources(qkv, sources))
    return out


def xformers_reasons(qkv: Tensor) -> list[str]:
    """Why xformers cannot take this tensor."""
    why_not = [] if XFORMERS_INSTALLED else ["xformers is not installed"]
    if not qkv.is_cuda:
        why_not.append(f"qkv is on {qkv.device.type}")
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        why_not.append(f"qkv is {dtype_name(qkv.dtype)} (supported: fp16, bf16)")
    return why_not
