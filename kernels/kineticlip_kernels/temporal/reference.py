"""The specification of `frame_attention` in plain PyTorch. Letters: see ops.py."""

from __future__ import annotations

from torch import Tensor


def frame_attention_reference(qkv: Tensor) -> Tensor:
    """The specification of `frame_attention` in plain PyTorch."""
    q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, H, T, K]
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # [B, H, T, T]
    mixed: Tensor = scores.softmax(dim=-1) @ v  # [B, H, T, K]
    return mixed.transpose(1, 2)
