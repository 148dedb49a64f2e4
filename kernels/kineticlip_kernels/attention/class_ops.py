"""Attention of the class token alone: each token is read once and never projected.

Shape letters: M images, N tokens (class + patches), H heads, K head width, D = H * K width;
sources as in sources.py, but normed tokens instead of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kineticlip_kernels.attention.reference import class_attention_reference
from kineticlip_kernels.attention.sources import MAX_SOURCES
from kineticlip_kernels.dispatch import (
    Impl,
    UnsupportedInput,
    check_operands,
    choose,
    dtype_name,
    matrix_reasons,
)

# Of the Triton face of class_attention: a program holds H sums of D. With 32 heads of 1024 its
# backward would take 262,144 bytes of shared memory, and sm_90 has 232,448.
MAX_CLASS_WIDTH = 1024
MAX_CLASS_HEADS = 16


def class_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    heads: int,
    sources: Sequence[Tensor] = (),
    impl: Impl = "auto",
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
