"""Launches of the temporal header's attention at its usual lengths, for compilation only."""

from __future__ import annotations

from functools import partial

import torch

from kineticlip_kernels.temporal.frames_triton import frame_attention_triton


def attention(frames: int, width: int, dtype: torch.dtype) -> None:
    qkv = torch.empty(2, frames, 3, 12, width, dtype=dtype, device="meta", requires_grad=True)
    out = frame_attention_triton(qkv)
    torch.autograd.grad(out, qkv, torch.empty_like(out))


# The longest sequences that the face takes, and the usual one.
SHAPES = [(32, 64, torch.bfloat16), (77, 64, torch.bfloat16)]
SHAPES += [(64, 128, torch.bfloat16), (32, 64, torch.float32)]

CASES = {f"frame_attention {shape}": partial(attention, *shape) for shape in SHAPES}

KINDS = {
    # 4 KiB a head and clip: neither products nor memory, but launches bound it. HGMMA, which
    # other attention must have on sm_90, takes 64 rows; the usual 8 to 32 frames run on HMMA.
    "temporal.frames_triton._forward": "small",
    "temporal.frames_triton._backward": "small",
}
