"""Multi-head attention of a ViT block on packed projections, with extra keys and values.

Shape letters: M images, N tokens (class + patches), H heads, K head width; sources: see sources.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from kineticlip_kernels.attention.reference import attention_reference
from kineticlip_kernels.attention.sources import MAX_SOURCES, Source, check_sources
from kineticlip_kernels.attention.torch_faces import (
    attention_chunked,
    attention_sdpa,
    attention_xformers,
    xformers_reasons,
)
from kineticlip_kernels.dispatch import choose, matrix_reasons, record_choice

AttentionImpl = Literal["auto", "reference", "sdpa", "chunked", "xformers", "triton"]
FACES = get_args(AttentionImpl)
MAX_HEAD_WIDTH = 128  # of the Triton face


def attention(
    qkv: Tensor, *, sources: Sequence[Source] = (), impl: AttentionImpl = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, where k and v are the image's own tokens and the sources'.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1. qkv [M, N, 3, H, K] as one
    projection writes it; sources: (k, v) pairs of its dtype, each [M', n, H, K] with M a multiple
    of M' -> [M, N, H, K] of that dtype. The result does not depend on the order of the sources.
    Differentiable in all, but for "chunked", the choice in bf16 on a CPU without gradients.
    Raises UnsupportedInput for other shapes and dtypes, for tensors on several devices, and where
    the face asked for cannot run.
    """
    check_sources("attention", qkv, sources)
    face = choose_attention(qkv, sources, impl)
    if face == "chunked":
        return attention_chunked(qkv, sources=sources)
    if face == "sdpa":
        return attention_sdpa(qkv, sources=sources)
    if face == "xformers":
        return attention_xformers(qkv, sources=sources)
    if face == "triton":
        from kineticlip_kernels.attention.forward_triton import attention_triton

        return attention_triton(qkv, sources=sources)
    return attention_reference(qkv, sources=sources)


def choose_attention(qkv: Tensor, sources: Sequence[Source], impl: AttentionImpl) -> str:
    """The face that `attention` runs. Raises UnsupportedInput where impl cannot run."""
    if impl == "auto":
        return _fastest(qkv, sources)
    why_not = []
    if impl == "triton":
        why_not = attention_reasons(impl, qkv, sources)
    elif impl == "xformers":
        why_not = xformers_reasons(qkv)
    elif impl == "chunked" and _recorded(qkv, sources):
        why_not = ["gradients are wanted, and it keeps nothing for them"]
    elif impl == "chunked" and torch.is_autocast_enabled(qkv.device.type):
        why_not = ["autocast would change its products' dtype"]
    return choose("attention", impl, why_not, fast=impl, slow="sdpa", known=FACES)


def _recorded(qkv: Tensor, sources: Sequence[Source]) -> bool:
    """Whether a gradient of these will be asked for."""
    tensors = (qkv, *(tensor for source in sources for tensor in source))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _fastest(qkv: Tensor, sources: Sequence[Source]) -> str:
    if qkv.device.type == "cpu":
        plain = qkv.dtype != torch.bfloat16 or _recorded(qkv, sources)
        face = "sdpa" if plain or torch.is_autocast_enabled("cpu") else "chunked"
        return record_choice("attention", face, [f"qkv is on {qkv.device.type}"])
    # SDPA is cuDNN's kernel on sm_90, but has to be handed all keys and values in one tensor:
    # copying them moves as many bytes as the attention itself. The kernel here takes them apart.
    why_not = attention_reasons("auto", qkv, sources)
    if not sources:
        why_not = ["no sources: sdpa needs no copies", *why_not]
    return record_choice("attention", "sdpa" if why_not else "triton", why_not)


def attention_reasons(impl: str, qkv: Tensor, sources: Sequence[Source]) -> list[str]:
    """Why the Triton face cannot take these tensors."""
    keys = {f"source {index}": k for index, (k, _) in enumerate(sources)}
    why_not = matrix_reasons(impl, qkv=qkv, **keys)
    if len(sources) > MAX_SOURCES:
        why_not.append(f"{len(sources)} sources (at most {MAX_SOURCES})")
    if qkv.shape[-1] > MAX_HEAD_WIDTH:
        why_not.append(f"heads {qkv.shape[-1]} wide (at most {MAX_HEAD_WIDTH})")
    return why_not
