"""EVL's one query per clip over all its tokens, and the projections on either side of it.

Letters and source: see ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kineticlip_kernels.dispatch import UnsupportedInput, check_operands, triton_reasons
from kineticlip_kernels.evl.faces import EvlImpl, choose_face
from kineticlip_kernels.evl.reference import attend_tokens_reference

MAX_WIDTH = 2048  # C of `attend_tokens`: a tile of tokens is whole rows in registers
MAX_HEADS = 16  # Q; with 32, kernels of 1024 columns spill registers


def attend_tokens(
    query: Tensor,
    tokens: Tensor,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    position: Tensor | None = None,
    motion: Tensor | None = None,
    eps: float = 1e-5,
    impl: EvlImpl = "auto",
) -> Tensor:
    """One query per clip and head over all its tokens, normalised but never projected.

    f = tokens + depthwise conv over time of tokens + position + motion (none for class tokens),
    z = (f - mean) / std, and the result is sum_n softmax_n(query . z_n) z_n.
    query [B, Q, C], see `absorb_query`; tokens [B, T, N, C]; conv_weight [C, 1, 3] and conv_bias
    [C], zero padding; position [T, C]; motion [B, T, P, C], what `displacement` gives; every
    term may be left out -> [B, Q, C] of query's dtype. Dtypes may differ; sums are fp32.
    Differentiable in all. Raises UnsupportedInput for other shapes, for integers, for tensors on
    several devices, and where the face asked for cannot run.
    """
    terms = {
        "conv_weight": conv_weight,
        "conv_bias": conv_bias,
        "position": position,
        "motion": motion,
    }
    given = {name: term for name, term in terms.items() if term is not None}
    _check_tokens(query, tokens, given)
    why_not = triton_reasons(impl, query=query, tokens=tokens, **given)
    if tokens.shape[-1] > MAX_WIDTH:
        why_not.append(f"C is {tokens.shape[-1]} (at most {MAX_WIDTH})")
    if query.shape[1] > MAX_HEADS:
        why_not.append(f"Q is {query.shape[1]} (at most {MAX_HEADS})")
    face = choose_face("attend_tokens", impl, why_not)
    if face == "triton":
        from kineticlip_kernels.evl.tokens_triton import attend_tokens_triton

        return attend_tokens_triton(query, tokens, **terms, eps=eps)
    if face == "lean":
        from kineticlip_kernels.evl.tokens_lean import attend_tokens_lean

        return attend_tokens_lean(query, tokens, **terms, eps=eps)
    return attend_tokens_reference(query, tokens, **terms, eps=eps)


def _check_tokens(query: Tensor, tokens: Tensor, given: dict[str, Tensor]) -> None:
    check_operands("attend_tokens", query=query, tokens=tokens, **given)
    if tokens.ndim != 4:
        raise UnsupportedInput(
            f"attend_tokens: tokens are {tuple(tokens.shape)}, expected [B, T, N, C]"
        )
    clips, frames, count, width = tokens.shape
    expected = {
        "conv_weight": (width, 1, 3),
        "conv_bias": (width,),
        "position": (frames, width),
        "motion": (clips, frames, count - 1, width),
    }
    for name, term in given.items():
        if term.shape != expected[name]:
            raise UnsupportedInput(
                f"attend_tokens: {name} is {tuple(term.shape)}, expected {expected[name]}"
            )
    if query.ndim != 3 or (query.shape[0], query.shape[2]) != (clips, width):
        raise UnsupportedInput(
            f"attend_tokens: query is {tuple(query.shape)}, expected [{clips}, Q, {width}]"
        )
    if ("conv_weight" in given) != ("conv_bias" in given):
        raise UnsupportedInput("attend_tokens: conv_weight and conv_bias come together")


def absorb_query(q: Tensor, norm_weight: Tensor, key_weight: Tensor, *, heads: int) -> Tensor:
    """The query of a clip seen through the key projection and the norm before it.

    q [B, D], projected, with bias; norm_weight [C]; key_weight [D, C] -> [B, Q, C]. The biases
    of the norm and of the keys add the same to every score of a query, so softmax drops them.
    """
    parts = q.unflatten(-1, (heads, -1)) * (q.shape[-1] // heads) ** -0.5  # [B, Q, D / Q]
    return torch.einsum("bqd,qdc->bqc", parts, key_weight.unflatten(0, (heads, -1))) * norm_weight


def project_mixed(
    mixed: Tensor, norm_weight: Tensor, norm_bias: Tensor, value_weight: Tensor, value_bias: Tensor
) -> Tensor:
    """Norm and value projection behind the weighted sum, whose weights add up to one.

    mixed [B, Q, C] of `attend_tokens`; value_weight [D, C]; value_bias [D] -> [B, D].
    """
    normed = mixed * norm_weight + norm_bias
    per_head = value_weight.unflatten(0, (mixed.shape[1], -1))  # [Q, D / Q, C]
    return torch.einsum("bqc,qdc->bqd", normed, per_head).flatten(1) + value_bias
