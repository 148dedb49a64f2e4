"""EVL's decoder on the three ops of kineticlip_kernels.evl, under the official parameter names.

For the tests against recorded outputs of the official code, and for the benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from kineticlip_kernels.evl import (
    EvlImpl,
    absorb_query,
    attend_tokens,
    displacement,
    neighbour_maps,
    project_mixed,
)


class Terms(TypedDict, total=False):
    """What is added to the tokens of a layer; as `attend_tokens` names it."""

    conv_weight: Tensor
    conv_bias: Tensor
    position: Tensor
    motion: Tensor


@dataclass(frozen=True)
class Decoder:
    """Weights `decoder.*` and `proj.*`; conv, position and motion switch the temporal terms."""

    weights: Mapping[str, Tensor]
    layers: int
    heads: int
    grid: tuple[int, int]
    impl: EvlImpl
    conv: bool = True
    position: bool = True
    motion: bool = True

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], config: Mapping[str, Any], **rest: Any) -> Decoder:
        """From a golden `config.json`."""
        height, width = (
            a // b for a, b in zip(config["input_size"], config["patch_size"], strict=True)
        )
        return cls(
            weights,
            config["decoder_num_layers"],
            config["decoder_num_heads"],
            (height, width),
            **rest,
        )

    def __call__(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """features `feat.{i}.q|k|out` -> xattn.{i}, query.{i}, logits."""
        clips = len(features["feat.0.out"])
        state = self.weights["decoder.cls_token"].expand(clips, -1)  # [B, C]
        found = {}
        for layer in range(self.layers):
            terms = self._terms(layer, features)
            if self.motion:
                found[f"xattn.{layer}"] = F.pad(terms["motion"], (0, 0, 1, 0))
            state = state + self._attend(layer, state, features[f"feat.{layer}.out"], terms)
            state = state + self._mlp(layer, state)
            found[f"query.{layer}"] = state.unsqueeze(1)
        found["logits"] = self._linear("proj.2", self._norm("proj.0", state))
        return found

    def _terms(self, layer: int, features: Mapping[str, Tensor]) -> Terms:
        terms: Terms = {}
        if self.conv:
            terms["conv_weight"] = self.weights[f"decoder.temporal_conv.{layer}.weight"]
            terms["conv_bias"] = self.weights[f"decoder.temporal_conv.{layer}.bias"]
        if self.position:
            terms["position"] = self.weights[f"decoder.temporal_pos_embed.{layer}"]
        if self.motion:
            q, k = (features[f"feat.{layer}.{name}"] for name in "qk")
            pair = (self.weights[f"decoder.cross_attention.{layer}.w{i}"] for i in (1, 2))
            maps = neighbour_maps(q, k, impl=self.impl)
            terms["motion"] = displacement(maps, *pair, grid=self.grid, impl=self.impl)
        return terms

    def _attend(self, layer: int, state: Tensor, tokens: Tensor, terms: Terms) -> Tensor:
        prefix = f"decoder.decoder_layers.{layer}"
        norm = (self.weights[f"{prefix}.norm3.{name}"] for name in ("weight", "bias"))
        norm_weight, norm_bias = norm
        q = self._linear(f"{prefix}.attn.q_proj", self._norm(f"{prefix}.norm1", state))
        key_weight = self.weights[f"{prefix}.attn.k_proj.weight"]
        query = absorb_query(q, norm_weight, key_weight, heads=self.heads)
        mixed = attend_tokens(query, tokens, **terms, impl=self.impl)
        value = (self.weights[f"{prefix}.attn.v_proj.{name}"] for name in ("weight", "bias"))
        values = project_mixed(mixed, norm_weight, norm_bias, *value)
        return self._linear(f"{prefix}.attn.out_proj", values)

    def _mlp(self, layer: int, state: Tensor) -> Tensor:
        prefix = f"decoder.decoder_layers.{layer}"
        hidden = self._linear(f"{prefix}.mlp.fc1", self._norm(f"{prefix}.norm2", state))
        return self._linear(f"{prefix}.mlp.fc2", hidden * torch.sigmoid(1.702 * hidden))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
