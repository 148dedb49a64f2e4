"""EVL's ops in its decoder, against recorded outputs of the official code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evl_decoder import Decoder
from kernel_rig import DEVICE
from safetensors.torch import load_file
from torch import Tensor

from kineticlip_kernels.evl import EvlImpl

FORWARD, GRADIENT = 1e-5, 5e-5  # of the largest value: the tolerances of the golden files


def load_golden(shared: Path, name: str, file: str) -> dict[str, Tensor]:
    tensors = load_file(shared / "golden" / "evl" / name / f"{file}.safetensors")
    return {key: value.to(DEVICE) for key, value in tensors.items()}


def compare(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    error = (found.detach() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize(
    ("name", "impl"),
    [("square", "reference"), ("square", "lean"), ("rect", "lean"), ("rect", "triton")],
)
def test_decoder_is_the_official_one(shared: Path, name: str, impl: EvlImpl) -> None:
    config: dict[str, Any] = json.loads(
        (shared / "golden" / "evl" / name / "config.json").read_text()
    )
    weights, golden = load_golden(shared, name, "weights"), load_golden(shared, name, "io")
    decoder = Decoder.of(weights, config, impl=impl)
    if impl == "triton":
        decoder = replace(decoder, layers=1)  # the interpreter takes two seconds for one
        if DEVICE != "cpu":  # where the neighbour maps of fp32 queries have no kernel
            decoder = replace(decoder, impl="auto")
    found = decoder(golden)
    if decoder.layers < config["decoder_num_layers"]:
        del found["logits"]
    assert len(found) >= 2 * decoder.layers
    for key, value in found.items():
        compare(value, golden[key], FORWARD, key)


@pytest.mark.parametrize("name", ["square", "rect"])
def test_every_variant_trains_as_the_official_one(shared: Path, name: str) -> None:
    config: dict[str, Any] = json.loads(
        (shared / "golden" / "evl" / name / "config.json").read_text()
    )
    weights, golden = load_golden(shared, name, "weights"), load_golden(shared, name, "io")
    variants = load_golden(shared, name, "variants")
    parameters = {key: value.requires_grad_() for key, value in weights.items()}
    tags = sorted({key.partition(".")[0] for key in variants})
    assert len(tags) >= 5
    for tag in tags:
        conv, position, motion = (letter == "1" for letter in tag[1::2])
        switches = {"conv": conv, "position": position, "motion": motion}
        decoder = Decoder.of(parameters, config, impl="lean", **switches)
        logits = decoder(golden)["logits"]
        compare(logits, variants[f"{tag}.logits"], FORWARD, f"{tag}.logits")
        # The true gradient of the key bias is zero; what is recorded is rounding noise.
        keys = [k for k in variants if k.startswith(f"{tag}.grad.") and "k_proj.bias" not in k]
        wanted = [parameters[key.partition(".grad.")[2]] for key in keys]
        loss = F.cross_entropy(logits, golden["labels"])
        for key, grad in zip(keys, torch.autograd.grad(loss, wanted), strict=True):
            compare(grad, variants[key], GRADIENT, key)
