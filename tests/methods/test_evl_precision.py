"""EVL's frozen trunk in 16 bits under a decoder that trains in float32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kineticlip.formats.trained import load_weights
from kineticlip.methods.evl import EVL, METHOD, build, cast_trunk
from kineticlip.runtime.distributed import Ranks, initialise
from kineticlip.runtime.errors import UserError
from kineticlip.training.job import Job, Outcome, Validate
from kineticlip.training.loop import train
from official_run import NAMES, Clips, settings
from toy_training import rows


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    before = dict(os.environ)
    yield initialise(Ranks())
    os.environ.clear()
    os.environ.update(before)


def lively(*more: str) -> EVL:
    """A model without zeros where training starts from them."""
    model = build(settings("evl", "unused", *more), NAMES)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in (*model.decoder.parameters(), *model.proj.parameters()):
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model


def run(
    output: Path, device: torch.device, *more: str, validate: Validate | None = None
) -> Outcome:
    config = settings("evl", output, "evl.backbone_precision=bf16", *more)
    job = Job(
        config=config,
        method=METHOD,
        model=lively(),
        loader=Clips(Ranks()),
        ranks=Ranks(),
        device=device,
        class_names=NAMES,
        validate=validate,
    )
    return train(job)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_trunk_alone_is_rounded(precision: str) -> None:
    model, whole = lively(), lively()
    originals = cast_trunk(model, settings("evl", "", f"evl.backbone_precision={precision}"))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    batch = next(Clips(Ranks()).epoch(0))
    for name, parameter in model.named_parameters():
        rounded = name.startswith("visual.") and ".ln_" not in name
        assert parameter.dtype == (dtype if rounded else torch.float32), name
        assert (name in originals) == rounded
        if rounded:
            assert torch.equal(originals[name], whole.get_parameter(name)), name
    held, full = (sum(p.nbytes for p in each.visual.parameters()) for each in (model, whole))
    assert held < 0.51 * full
    with torch.no_grad():
        logits, expected = (each.eval()(batch.pixels) for each in (model, whole))
    model.train()
    assert logits.dtype == torch.float32
    atol = 4 * torch.finfo(dtype).eps * float(expected.abs().max())  # roundings of four blocks
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)
    assert not torch.equal(logits, expected)
    loss, _ = METHOD.loss(model, batch)
    loss.backward()
    graded = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert graded == {torch.float32}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_training_resumes_to_the_bit_and_exports_the_trunk_as_it_came(
    tmp_path: Path,
    device: torch.device,
    stage: int,
) -> None:
    options = (f"train.zero_stage={stage}", "train.checkpoint_every=2", "train.eval_every=0")
    whole = run(tmp_path / "whole", device, *options)

    def interrupt(model: Any, step: int) -> dict[str, Any]:
        assert model.visual.conv1.weight.dtype == torch.bfloat16
        assert model.decoder.cls_token.dtype == torch.float32
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # behind the last step: 4 of 5 are saved
        run(tmp_path / "broken", device, *options, validate=interrupt)
    broken = run(tmp_path / "broken", device, *options)
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    ours, theirs = (load_weights(outcome.weights).tensors for outcome in (broken, whole))
    start = lively().state_dict()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.float32 and torch.equal(ours[name], tensor), name
        assert torch.equal(tensor, start[name]) == name.startswith("visual."), name


def test_what_cannot_be_held_apart_is_refused() -> None:
    wanted = "evl.backbone_precision=fp16"
    with pytest.raises(UserError, match=r"only of a frozen trunk; evl.finetune trains it"):
        cast_trunk(lively(), settings("evl", "", wanted, "evl.finetune=true"))
    with pytest.raises(UserError, match=r"train.precision bf16 rounds the trunk too"):
        cast_trunk(lively(), settings("evl", "", wanted, "train.precision=bf16"))
    assert cast_trunk(lively(), settings("evl", "")) == {}
