"""Attention between the frames of a clip: sequences so short that one program holds them whole.

Shape letters: B clips, T frames, H heads, K head width.

"auto" takes the kernel here wherever it can run, and the general `attention` elsewhere. Both read
qkv and write the result once forward; at T <= 77 either is bound by its launches, not by what it
moves: 4 KiB a head and tensor at T = 32. Backward, PyTorch's attention makes three gradients in
two or three kernels, then packs them in a fourth; here one kernel writes them packed. Tiles of 128
queries, which the general kernels have, would be three quarters empty.
"""

from __future__ import annotations

from torch import Tensor

from kineticlip_kernels.attention import FACES, AttentionImpl, attention
from kineticlip_kernels.dispatch import (
    UnsupportedInput,
    check_operands,
    choose,
    dtype_name,
    triton_reasons,
)
from kineticlip_kernels.launch import power_of_two
from kineticlip_kernels.temporal.reference import frame_attention_reference

# T * K, both rounded up to powers of two, by bytes an element: beyond it registers spill, on
# sm_80 first. 128 frames in 16 bits and 32 in fp32 at K = 64, half of it at 128.
MAX_TILE = {2: 128 * 64, 4: 32 * 64}


def frame_attention(qkv: Tensor, *, impl: AttentionImpl = "auto") -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the frames of each clip.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1. qkv [B, T, 3, H, K] as one
    projection writes it, of any floating dtype and strides -> [B, T, H, K] of that dtype.
    Differentiable; the Triton face is one kernel each way, keeps nothing but qkv, and writes the
    gradient packed as the projection wants it. All shapes are static and nothing waits for the
    device, so a CUDA graph can hold a whole header of such layers. Other faces, and what "auto"
    takes where the kernel cannot run: see `attention`. Raises UnsupportedInput for other shapes,
    for integers, and where the face asked for cannot run.
    """
    check_operands("frame_attention", qkv=qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise UnsupportedInput(
            f"frame_attention: qkv is {tuple(qkv.shape)}, expected [B, T, 3, H, K]"
        )
    if impl in ("sdpa", "xformers", "chunked"):
        return attention(qkv, impl=impl)
    why_not = frame_reasons(impl, qkv)
    face = choose("frame_attention", impl, why_not, slow="attention", known=FACES)
    if face == "attention":
        return attention(qkv)
    if face == "reference":
        return frame_attention_reference(qkv)
    from kineticlip_kernels.temporal.frames_triton import frame_attention_triton

    return frame_attention_triton(qkv)


def frame_reasons(impl: str, qkv: Tensor) -> list[str]:
    """Why the Triton face cannot take this tensor."""
    why_not = triton_reasons(impl, qkv=qkv)
    frames, width = (max(power_of_two(size), 16) for size in (qkv.shape[1], qkv.shape[4]))
    limit = MAX_TILE.get(qkv.itemsize)
    if limit is not None and frames * width > limit:
        why_not.append(
            f"{qkv.shape[1]} frames of {qkv.shape[4]} channels in {dtype_name(qkv.dtype)} "
            f"(at most {limit // width} frames)"
        )
    return why_not
