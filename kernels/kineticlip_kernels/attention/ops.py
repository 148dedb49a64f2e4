"""Multi-head attention of a ViT block on packed projections, with extra keys and values.

Shape letters: M images, N tokens (class + patches), H heads, K head width, D = H * K width;
a source has M' rows of n tokens, and row m of the batch reads source row m // (M // M').
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.dispatch import (
    UnsupportedInput,
    check_operands,
    choose,
    dtype_name,
    matrix_reasons,
    record_choice,
)

AttentionImpl = Literal["auto", "reference", "sdpa", "chunked", "xformers", "triton"]
FACES = get_args(AttentionImpl)
Source = tuple[Tensor, Tensor]  # keys and values, each [M', n, H, K]
MAX_SOURCES = 4  # of the Triton face: a custom operator has a fixed number of arguments
MAX_HEAD_WIDTH = 128  # of the Triton face
# Of the Triton face of class_attention: a program holds H sums of D. With 32 heads of 1024 its
# backward would take 262,144 bytes of shared memory, and sm_90 has 232,448.
MAX_CLASS_WIDTH = 1024
MAX_CLASS_HEADS = 16
CHUNK = 1 << 20  # scores at a time on the CPU: 2 MiB of bf16 stay in its cache
# Looked up once, as Triton is: torch.compile does not trace through find_spec.
XFORMERS_INSTALLED = importlib.util.find_spec("xformers") is not None


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


def attention_reference(qkv: Tensor, *, sources: Sequence[Source] = ()) -> Tensor:
    """The specification of `attention` in plain PyTorch."""
    q, k, v = qkv.unbind(2)  # [M, N, H, K]
    q = q * q.shape[-1] ** -0.5
    keys, values = zip((k, v), *sources, strict=True)
    scores = torch.cat([_scores(q, key) for key in keys], dim=-1)  # [M, H, N, N + sum n]
    weights = _parts(scores.softmax(dim=-1), [key.shape[1] for key in keys])
    parts = [_mix(part, value) for part, value in zip(weights, values, strict=True)]
    return sum(parts[1:], parts[0])  # [M, N, H, K]


def attention_chunked(qkv: Tensor, *, sources: Sequence[Source] = ()) -> Tensor:
    """Matrix products and softmax on a few heads at a time: the fastest in bf16 on a CPU.

    All heads at once leave the cache, and SDPA's CPU kernel is slower at these shapes
    (bench/cpu_choices.py). Keeps nothing for a backward pass.
    """
    q, k, v = (part.transpose(1, 2) for part in _with_sources(qkv, sources))  # [M, H, N, K]
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
    q, k, v = (part.transpose(1, 2) for part in _with_sources(qkv, sources))  # [M, H, N, K]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_xformers(qkv: Tensor, *, sources: Sequence[Source] = ()) -> Tensor:
    """xformers' memory-efficient attention; sources are appended, which copies k and v."""
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(*_with_sources(qkv, sources))
    return out


def class_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    heads: int,
    sources: Sequence[Tensor] = (),
    impl: Literal["auto", "reference", "triton"] = "auto",
) -> Tensor:
    """Attention of the class token alone, keys and values never projected.

    x [M, N, D]: the block's normed input, token 0 is the class token; weight [3 D, D] and bias
    [3 D]: the packed q, k, v projection; sources: normed tokens [M', n, D], all of one dtype
    -> [M, H, K] of it, what row 0 of `attention` gives. The key projection moves to the query and
    the value projection behind the sum: 2 N D H products for each image instead of 4 N D^2.
    Exact, by associativity: see `absorbed_query`. Differentiable in all. Raises UnsupportedInput
    for other shapes and dtypes, for tensors on several devices, and where the face asked for
    cannot run.
    """
    _check_class_operands(x, weight, bias, heads, sources)
    why_not = class_attention_reasons(impl, x, weight, bias, sources, heads=heads)
    if choose("class_attention", impl, why_not) == "reference":
        return class_attention_reference(x, weight, bias, heads=heads, sources=sources)
    from kineticlip_kernels.attention.class_triton import class_attention_triton

    return class_attention_triton(x, weight, bias, heads=heads, sources=sources)


def class_attention_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, heads: int, sources: Sequence[Tensor] = ()
) -> Tensor:
    """The specification of `class_attention` in plain PyTorch."""
    query = absorbed_query(x, weight, bias, heads)  # [M, H, D]
    tokens = [_shared_rows(source, len(x)) for source in (x, *sources)]  # [M, n, D]
    scores = torch.cat([query @ rows.transpose(1, 2) for rows in tokens], dim=-1)  # [M, H, S]
    weights = _parts(scores.softmax(dim=-1), [rows.shape[1] for rows in tokens])
    parts = [part @ rows for part, rows in zip(weights, tokens, strict=True)]
    return project_values(sum(parts[1:], parts[0]), weight, bias, heads)


def absorbed_query(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """The class token's query seen through the key projection, scaled. -> [M, H, D].

    q . (W_k y + b_k) = (W_k^T q) . y + q . b_k, and the last term is the same for every key.
    """
    width = x.shape[-1]
    q = F.linear(x[:, 0], weight[:width], bias[:width]) * (width // heads) ** -0.5  # [M, D]
    key_weight = weight[width : 2 * width].unflatten(0, (heads, -1))  # [H, K, D]
    return torch.einsum("mhk,hkd->mhd", q.unflatten(1, (heads, -1)), key_weight)


def project_values(mixed: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """W_v sum(p y) + b_v, head by head: the weights p sum to one. mixed [M, H, D] -> [M, H, K]."""
    width = mixed.shape[-1]
    value_weight = weight[2 * width :].unflatten(0, (heads, -1))  # [H, K, D]
    value_bias = bias[2 * width :].unflatten(0, (heads, -1))  # [H, K]
    out: Tensor = torch.einsum("mhd,hkd->mhk", mixed, value_weight) + value_bias
    return out


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


def class_attention_reasons(
    impl: str, x: Tensor, weight: Tensor, bias: Tensor, sources: Sequence[Tensor], *, heads: int
) -> list[str]:
    """Why the Triton face of `class_attention` cannot take these tensors."""
    tokens = {f"source {index}": source for index, source in enumerate(sources)}
    why_not = matrix_reasons(impl, x=x, weight=weight, bias=bias, **tokens)
    if len(sources) > MAX_SOURCES:
        why_not.append(f"{len(sources)} sources (at most {MAX_SOURCES})")
    if x.shape[-1] > MAX_CLASS_WIDTH:
        why_not.append(f"tokens {x.shape[-1]} wide (at most {MAX_CLASS_WIDTH})")
    if heads > MAX_CLASS_HEADS:
        why_not.append(f"{heads} heads (at most {MAX_CLASS_HEADS})")
    return why_not


def xformers_reasons(qkv: Tensor) -> list[str]:
    """Why xformers cannot take this tensor."""
    why_not = [] if XFORMERS_INSTALLED else ["xformers is not installed"]
    if not qkv.is_cuda:
        why_not.append(f"qkv is on {qkv.device.type}")
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        why_not.append(f"qkv is {dtype_name(qkv.dtype)} (supported: fp16, bf16)")
    return why_not


def check_sources(op: str, qkv: Tensor, sources: Sequence[Source]) -> None:
    """Raises UnsupportedInput unless the operands are what `attention` says, of one dtype."""
    operands: dict[str, Tensor] = {"qkv": qkv}
    for index, source in enumerate(sources):
        if isinstance(source, Tensor) or len(source) != 2:
            raise UnsupportedInput(f"{op}: source {index} is no pair (k, v) of tensors")
        operands[f"k of source {index}"], operands[f"v of source {index}"] = source
    check_operands(op, **operands)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise UnsupportedInput(f"{op}: qkv is {tuple(qkv.shape)}, expected [M, N, 3, H, K]")
    for index, (k, v) in enumerate(sources):
        same = k.shape == v.shape and k.dtype == v.dtype
        if not same or k.ndim != 4 or k.shape[2:] != qkv.shape[3:] or k.dtype != qkv.dtype:
            raise UnsupportedInput(
                f"{op}: source {index} is k {tuple(k.shape)} {dtype_name(k.dtype)}, "
                f"v {tuple(v.shape)} {dtype_name(v.dtype)}; expected two "
                f"[M', n, {qkv.shape[3]}, {qkv.shape[4]}] of {dtype_name(qkv.dtype)}"
            )
        rows = k.shape[0]
        if rows == 0 or len(qkv) % rows:
            raise UnsupportedInput(
                f"{op}: source {index} has {rows} rows, which do not divide {len(qkv)} images"
            )


def _check_class_operands(
    x: Tensor, weight: Tensor, bias: Tensor, heads: int, sources: Sequence[Tensor]
) -> None:
    named = {f"source {index}": source for index, source in enumerate(sources)}
    check_operands("class_attention", x=x, weight=weight, bias=bias, **named)
    width = x.shape[-1] if x.ndim == 3 and x.shape[1] else -1
    if weight.shape != (3 * width, width) or bias.shape != (3 * width,):
        raise UnsupportedInput(
            f"class_attention: x is {tuple(x.shape)}, weight {tuple(weight.shape)} and bias "
            f"{tuple(bias.shape)}; expected [M, N >= 1, D], [3 D, D] and [3 D]"
        )
    if heads < 1 or width % heads:
        raise UnsupportedInput(f"class_attention: {heads} heads do not divide D {width}")
    for name, source in named.items():
        rows = source.shape[0] if source.ndim == 3 else 0
        if source.shape[2:] != x.shape[2:] or rows == 0 or len(x) % rows:
            raise UnsupportedInput(
                f"class_attention: {name} is {tuple(source.shape)}, expected "
                f"[M', n, {x.shape[-1]}] with M' dividing {len(x)}"
            )
        if source.dtype != x.dtype:
            raise UnsupportedInput(
                f"class_attention: {name} is {dtype_name(source.dtype)}, x {dtype_name(x.dtype)}; "
                "expected one dtype"
            )


def _scores(q: Tensor, key: Tensor) -> Tensor:
    """q [M, N, H, K], key [M', n, H, K] -> [M, H, N, n]."""
    rows = len(key)
    grouped = q.unflatten(0, (rows, len(q) // max(rows, 1)))  # [M', M / M', N, H, K]
    return torch.einsum("grnhk,gshk->grhns", grouped, key).flatten(0, 1)


def _parts(weights: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """weights.split(sizes, dim=-1), whose backward behind a softmax Inductor gets wrong on a CPU
    (PyTorch 2.11): gradients off by more than their size."""
    ends = list(itertools.accumulate(sizes))
    return [weights[..., end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """weights [M, H, N, n], value [M', n, H, K] -> [M, N, H, K]."""
    rows = len(value)
    grouped = weights.unflatten(0, (rows, len(weights) // max(rows, 1)))
    return torch.einsum("grhns,gshk->grnhk", grouped, value).flatten(0, 1)


def _shared_rows(source: Tensor, images: int) -> Tensor:
    """[M', n, ...] -> [M, n, ...], each row repeated for the images that share it."""
    rows = len(source)
    if rows == images:
        return source
    repeated = source.unsqueeze(1).expand(rows, images // rows, *source.shape[1:])
    return repeated.flatten(0, 1)


def _with_sources(qkv: Tensor, sources: Sequence[Source]) -> tuple[Tensor, Tensor, Tensor]:
    """q [M, N, H, K]; k and v [M, N + sum n, H, K], views of qkv where there are no sources."""
    q, k, v = qkv.unbind(2)
    if not sources:
        return q, k, v
    keys = torch.cat([k, *(_shared_rows(key, len(q)) for key, _ in sources)], dim=1)
    values = torch.cat([v, *(_shared_rows(value, len(q)) for _, value in sources)], dim=1)
    return q, keys, values
