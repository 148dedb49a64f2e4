"""The temporal header of Text4Vis on the fused ops, against its recorded output."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_rig import DEVICE
from safetensors.torch import load_file
from torch import Tensor

from kineticlip_kernels.dispatch import Impl
from kineticlip_kernels.mlp import linear_quick_gelu
from kineticlip_kernels.norm import add_layer_norm
from kineticlip_kernels.temporal import frame_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "text4vis" / "fusion_transf.safetensors"
EPS = 1e-12  # of the header's norms, as in the official code
HEADS = 2  # of the recorded header: text width 128 / 64


def header(weights: Mapping[str, Tensor], frames: Tensor, heads: int, impl: Impl) -> Tensor:
    """Text4Vis' temporal transformer on the fused ops: frame embeddings [B, T, E] -> [B, E]."""
    x = frames + weights["frame_position_embeddings.weight"][: frames.shape[1]]
    update = torch.zeros_like(x)
    layers = {key.split(".")[2] for key in weights if key.startswith("transformer.resblocks.")}
    for layer in sorted(layers, key=int):
        of = partial("transformer.resblocks.{}.{}".format, layer)
        pairs = {
            name: (weights[of(f"{name}.weight")], weights[of(f"{name}.bias")])
            for name in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        }
        x, y = add_layer_norm(x, update, *pairs["ln_1"], EPS, impl=impl)
        packed = weights[of("attn.in_proj_weight")], weights[of("attn.in_proj_bias")]
        qkv = F.linear(y, *packed).unflatten(-1, (3, heads, -1))  # [B, T, 3, H, K]
        mixed = frame_attention(qkv, impl=impl).flatten(2)
        update = F.linear(mixed, *pairs["attn.out_proj"])
        x, y = add_layer_norm(x, update, *pairs["ln_2"], EPS, impl=impl)
        # The GEMM's kernel needs 16 bits on a GPU, and these are the official 32.
        plain: Impl = impl if DEVICE == "cpu" else "reference"
        hidden = linear_quick_gelu(y, *pairs["mlp.c_fc"], impl=plain)
        update = F.linear(hidden, *pairs["mlp.c_proj"])
    return (x + update + frames).mean(dim=1)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_header_of_six_layers_is_the_official_one(impl: Impl) -> None:
    stored = {key: value.float().to(DEVICE) for key, value in load_file(GOLDEN).items()}
    weights = {key.removeprefix("fusion_model."): value for key, value in stored.items()}
    case = load_file(GOLDEN.with_name("case_fusion_only.safetensors"))
    found = header(weights, case["x"].float().to(DEVICE), HEADS, impl)
    expected = case["y_Transf"].float().to(DEVICE)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
