"""What bench/methods.py claims, as far as it does not depend on the clock."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kineticlip.config import Config
from kineticlip.methods.vitaclip_cost import cost
from kineticlip.models.architectures import architecture
from kineticlip.models.cost import text, totals

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from methods import (
    FACES,
    FORMS,
    claims,
    evl_counts,
    evl_decoder,
    evl_taps,
    live_megabytes,
    problems,
)
from methods_vitaclip import vitaclip_counts


def test_the_decoder_needs_a_third_of_the_memory_forward_and_backward() -> None:
    plain, engine = (live_megabytes(face, "ViT-B-16", 8, 1) for face in FACES)
    assert 3 * engine <= plain
    assert 190 < plain < 215 and engine < 45


def test_both_forms_of_the_decoder_are_one_function() -> None:
    found = {}
    for face in FACES:
        decoder = evl_decoder("ViT-tiny-16", 3)
        state = FORMS[face](decoder, evl_taps(decoder, 2), 2)
        state.square().sum().backward()
        found[face] = {"state": state.detach()}
        for name, parameter in decoder.named_parameters():
            assert parameter.grad is not None, name
            found[face][name] = parameter.grad
    for name, expected in found["straightforward"].items():
        if "k_proj.bias" not in name:  # rounding noise there, zero here
            near = 2e-5 * float(expected.abs().max())
            torch.testing.assert_close(found["engine"][name], expected, atol=near, rtol=0, msg=name)


@pytest.mark.parametrize("arch", ["ViT-B-32", "ViT-B-16"])
def test_multiply_adds_of_the_decoder_are_torchs(arch: str) -> None:
    counts = evl_counts(arch, 2, 1)
    assert counts["counted"] == counts["expected"]
    projections = counts["key_value_projections"]
    assert projections["straightforward"] > 35 * projections["engine"]  # 64 times for long clips


@pytest.mark.parametrize(("arch", "frames"), [("ViT-B-16", 8), ("ViT-L-14-336", 32)])
def test_multiply_adds_of_prompts_are_torchs(arch: str, frames: int) -> None:
    """On tensors without memory, so the largest configuration costs nothing."""
    counts = vitaclip_counts(arch, frames)
    assert counts["counted"]["straightforward"] == counts["expected"]["straightforward"]
    assert counts["counted"]["engine"] == counts["expected"]["engine"]


def test_evaluation_over_three_views_needs_a_third_of_the_products() -> None:
    """Text is most of it: 400 classes once, not with every video."""
    model = architecture("ViT-B-16")
    clip, sentences = totals(cost(Config(), model, 400)), text(model.text, 400)
    assert 3 * clip.official + sentences.official >= 4 * 3 * clip.ours


def measured(**values: Any) -> dict[str, Any]:
    return {
        "seconds": {"straightforward": {"median": 7.0}, "engine": {"median": 2.0}},
        "peak_megabytes": {"straightforward": 30.0, "engine": 5.0},
        "difference": {"state": 1e-6},
        **values,
    }


def test_a_claim_that_fails_is_named() -> None:
    assert [row["ratio"] for row in claims("evl", measured())] == [3.5, 6.0]
    assert problems("evl", measured()) == problems("vitaclip", measured()) == []
    worse = measured(peak_megabytes={"straightforward": 9.0, "engine": 5.0})
    assert problems("evl", worse) == ["evl: peak_megabytes: 1.80 times less, 3 are claimed"]
    wrong = problems("vitaclip", measured(difference={"scores": float("nan")}))
    assert wrong == ["vitaclip: scores differ by nan"]
